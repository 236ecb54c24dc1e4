#include "kd_cpu.h"

#include <cstring>
#include <stdexcept>

#ifdef MINIPLM_KD_X86
#include <xmmintrin.h>
#endif

namespace miniplm {
namespace kd {
namespace {

struct Variant {
  const char* name;
  Table table;
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
      {"avx512_bf16", Avx512Bf16Passes, bf16},
      {"avx512", Avx512Passes, avx512},
      {"avx2", Avx2Passes, avx2},
#endif
      {"scalar", ScalarPasses, true},
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

void RunRow(const Job& job, Steps steps, const Passes& passes, int64_t n) {
  const int64_t label = job.labels[n] - job.first;
  const Row row = {
      RowOf(job.student, n),
      job.form == Form::kNone ? nullptr : RowOf(job.teacher, n),
      job.valid,
      job.width,
      job.first,
      label >= 0 && label < job.valid ? label : -1,
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
    if (steps.grad) {
      std::memset(row.student, 0, static_cast<size_t>(row.width * (job.student.bf16 ? 2 : 4)));
    }
    return;
  }
  if (steps.stats) passes.stats(row, record);
  if (steps.inner && passes.inner != nullptr) passes.inner(row, *record, inner);
  if (steps.grad) passes.grad(row, *record, inner == nullptr ? Inner{} : *inner);
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
  Passes passes = {};
  for (const Variant& known : KnownVariants()) {
    if (known.runs && variant == known.name) {
      passes = known.table(job.form, job.student.bf16, job.form != Form::kNone && job.teacher.bf16);
    }
  }
  if (passes.grad == nullptr) {
    throw std::invalid_argument("this machine has no variant " + variant);
  }
#pragma omp parallel num_threads(job.threads)
  {
    const FlushDenormals mode;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < job.rows; ++n) RunRow(job, steps, passes, n);
  }
}

}  // namespace kd
}  // namespace miniplm
