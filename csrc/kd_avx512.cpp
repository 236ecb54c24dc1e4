// The passes in AVX-512.

#include "kd_rows.h"

#ifdef MINIPLM_KD_X86

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// GCC 12 warns of its own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")

namespace miniplm {
namespace kd {
namespace {

#include "kd_single.h"
// The types first.
#include "kd_avx512.h"
#include "kd_kernel.h"
// What it defines, for sparse teachers.
#include "kd_sparse.h"

}  // namespace

Passes Avx512Passes(Form form, bool student_is_bf16, bool teacher_is_bf16) {
  return PassesOf(form, student_is_bf16, teacher_is_bf16);
}

SparsePasses Avx512SparsePasses(bool student_is_bf16) { return SparsePassesOf(student_is_bf16); }

}  // namespace kd
}  // namespace miniplm

#pragma GCC pop_options

#endif  // MINIPLM_KD_X86
