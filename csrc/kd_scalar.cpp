// The passes without vectors: for machines that are neither x86 nor new enough.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kd_rows.h"

namespace miniplm {
namespace kd {
namespace {

#include "kd_single.h"

using Wide = Single;

#include "kd_kernel.h"
// What it defines, for sparse teachers.
#include "kd_sparse.h"

}  // namespace

Passes ScalarPasses(Form form, bool student_is_bf16, bool teacher_is_bf16) {
  return PassesOf(form, student_is_bf16, teacher_is_bf16);
}

SparsePasses ScalarSparsePasses(bool student_is_bf16) { return SparsePassesOf(student_is_bf16); }

}  // namespace kd
}  // namespace miniplm
