#include "kd_cpu.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#ifdef MINIPLM_KD_X86
#include <xmmintrin.h>
#endif

namespace miniplm {
namespace kd {
namespace {

struct Variant {
  const char* name;
  Table table;
  SparseTable sparse_table;
  bool runs;
};

std::vector<Variant> KnownVariants() {
#ifdef MINIPLM_KD_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return {
#ifdef MINIPLM_KD_X86
      {"avx512_bf16", Avx512Bf16Passes, Avx512Bf16SparsePasses, bf16},
      {"avx512", Avx512Passes, Avx512SparsePasses, avx512},
      {"avx2", Avx2Passes, Avx2SparsePasses, avx2},
#endif
      {"scalar", ScalarPasses, ScalarSparsePasses, true},
  };
}

// Denormal numbers are 0 while it lives: they take a hundred cycles each, and probabilities below
// 1e-38 do not matter. The mode belongs to a thread and is put back.
class FlushDenormals {
 public:
#ifdef MINIPLM_KD_X86
  FlushDenormals() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero);
  }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned before_;
#else
  FlushDenormals() {}
#endif
};

unsigned char* RowOf(const Matrix& matrix, int64_t row) {
  return matrix.data + row * matrix.row_stride * (matrix.bf16 ? 2 : 4);
}

void ClearRow(const Matrix& matrix, int64_t row, int64_t width) {
  std::memset(RowOf(matrix, row), 0, static_cast<size_t>(width * (matrix.bf16 ? 2 : 4)));
}

// Column of a token's label in the shard, or -1.
template <class AnyJob>
int64_t LabelOf(const AnyJob& job, int64_t n) {
  const int64_t label = job.labels[n] - job.first;
  return label >= 0 && label < job.valid ? label : -1;
}

void RunRow(const Job& job, Steps steps, const Passes& passes, int64_t n) {
  const Row row = {
      RowOf(job.student, n),
      job.form == Form::kNone ? nullptr : RowOf(job.teacher, n),
      job.valid,
      job.width,
      job.first,
      LabelOf(job, n),
      job.form == Form::kNone ? 1.0f : job.student_scale[n],  // cross entropy has no temperature
      job.teacher_scale[n],
      job.kd_weight[n],
      job.ce_weight[n],
      job.beta,
      job.z_loss,
  };
  Record* record = reinterpret_cast<Record*>(job.records + n * kRecordFloats);
  Inner* inner = job.inners == nullptr ? nullptr : reinterpret_cast<Inner*>(job.inners) + n;
  if (row.kd_weight == 0 && row.ce_weight == 0) {
    if (steps.stats) *record = {};
    if (steps.inner && inner != nullptr) *inner = {};
    if (steps.grad) ClearRow(job.student, n, job.width);
    return;
  }
  if (steps.stats) passes.stats(row, record);
  if (steps.inner && passes.inner != nullptr) passes.inner(row, *record, inner);
  if (steps.grad) passes.grad(row, *record, inner == nullptr ? Inner{} : *inner);
}

// Room for the entries of a row; a thread's own.
struct Support {
  explicit Support(int64_t entries)
      : columns(static_cast<size_t>(entries)),
        logits(static_cast<size_t>(entries)),
        weights(static_cast<size_t>(entries)) {}

  std::vector<int32_t> columns;
  std::vector<float> logits, weights;
};

void RunRow(const SparseJob& job, Steps steps, const SparsePasses& passes, Support* support,
            int64_t n) {
  SparseRecord* record = reinterpret_cast<SparseRecord*>(job.records + n * kSparseRecordFloats);
  if (job.kd_weight[n] == 0 && job.ce_weight[n] == 0) {
    if (steps.stats) *record = {};
    if (steps.grad) ClearRow(job.student, n, job.width);
    return;
  }
  Row row = {};
  row.student = RowOf(job.student, n);
  row.valid = job.valid;
  row.width = job.width;
  row.first = job.first;
  row.label = LabelOf(job, n);
  row.student_scale = job.student_scale[n];
  row.kd_weight = job.kd_weight[n];
  row.ce_weight = job.ce_weight[n];
  row.z_loss = job.z_loss;
  const SparseRow sparse = {
      row,
      job.form,
      job.entries,
      job.ids + n * job.entries,
      job.weights + n * job.entries,
      job.tail[n],
      support->columns.data(),
      support->logits.data(),
      support->weights.data(),
  };
  if (steps.stats) passes.stats(sparse, record);
  if (steps.grad) passes.grad(sparse, *record);
}

Variant Known(const std::string& name) {
  for (const Variant& known : KnownVariants()) {
    if (known.runs && name == known.name) return known;
  }
  throw std::invalid_argument("this machine has no variant " + name);
}

}  // namespace

std::vector<std::string> Variants() {
  std::vector<std::string> names;
  for (const Variant& variant : KnownVariants()) {
    if (variant.runs) names.emplace_back(variant.name);
  }
  return names;
}

void Run(const Job& job, Steps steps, const std::string& variant) {
  const Passes passes =
      Known(variant).table(job.form, job.student.bf16, job.form != Form::kNone && job.teacher.bf16);
#pragma omp parallel num_threads(job.threads)
  {
    const FlushDenormals mode;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < job.rows; ++n) RunRow(job, steps, passes, n);
  }
}

void Run(const SparseJob& job, Steps steps, const std::string& variant) {
  const SparsePasses passes = Known(variant).sparse_table(job.student.bf16);
#pragma omp parallel num_threads(job.threads)
  {
    const FlushDenormals mode;
    Support support(job.entries);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < job.rows; ++n) RunRow(job, steps, passes, &support, n);
  }
}

}  // namespace kd
}  // namespace miniplm
