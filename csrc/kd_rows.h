// What the token losses do with one row of logits, and the table of functions that do it.
//
// kd_cpu.cpp goes over the rows; each of kd_scalar.cpp, kd_avx2.cpp, kd_avx512.cpp and
// kd_avx512_bf16.cpp compiles kd_kernel.h for one instruction set and exports one table. Nothing
// here may be inline code that those files share: the linker would keep only one of its versions.

#ifndef MEGATRON_MINIPLM_CSRC_KD_ROWS_H_
#define MEGATRON_MINIPLM_CSRC_KD_ROWS_H_

#include <cstdint>

// Per-function instruction sets are GCC's way of saying it; elsewhere there is the scalar variant.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MINIPLM_KD_X86
#endif

namespace miniplm {
namespace kd {

// kernels/token_loss.py: TokenLoss.form. Soft NLL shares forward KL's passes.
enum class Form {
  kNone,
  kForward,
  kReverse,
  kJsd,
  kSkewKl,
  kSkewRkl,
  kTvd,
  kMseLogits,
  kMseCentered,
  kMseLogProbs,
  kBrier,
};

// kernels/record.py: Field.
struct Record {
  float max_s, sum_s, sum_s1, gold_s, arg_s;
  float max_t, sum_t, sum_t1, gold_t, arg_t;
  float forward, reverse, entropy;
  float columns, mean_d, square_d;
};
constexpr int64_t kRecordFloats = sizeof(Record) / sizeof(float);

// Sums over normalised probabilities, of the losses that need them.
struct Inner {
  float value, bracket;
};

// A shard's logits of one token. The student's are overwritten by the gradient.
struct Row {
  void* student;
  const void* teacher;
  int64_t valid;  // real columns
  int64_t width;  // all columns
  int64_t first;  // global number of column 0
  int64_t label;  // column of the label, or -1
  float student_scale, teacher_scale, kd_weight, ce_weight, beta, z_loss;
};

// The passes over a row, for one loss and one pair of types.
struct Passes {
  void (*stats)(const Row&, Record*);
  void (*inner)(const Row&, const Record&, Inner*);  // null: the loss needs none
  void (*grad)(const Row&, const Record&, const Inner&);
};

using Table = Passes (*)(Form form, bool student_is_bf16, bool teacher_is_bf16);

Passes ScalarPasses(Form form, bool student_is_bf16, bool teacher_is_bf16);
#ifdef MINIPLM_KD_X86
Passes Avx2Passes(Form form, bool student_is_bf16, bool teacher_is_bf16);
Passes Avx512Passes(Form form, bool student_is_bf16, bool teacher_is_bf16);
Passes Avx512Bf16Passes(Form form, bool student_is_bf16, bool teacher_is_bf16);
#endif

// --- a teacher of whom some tokens are known ----------------------------------------------------

// kernels/sparse_loss.py: SparseForm.
enum class SparseForm { kSupport, kResidual, kUniform, kOnSupport, kSquare, kSquareLogits };

// kernels/sparse_record.py: Field.
struct SparseRecord {
  float off_max, off_sum, off_sum1, off_arg, off_square, off_columns, off_mean;
  float on_max, on_sum, on_sum1, on_arg, on_square, on_weight, on_cross, on_overlap;
  float on_count, on_mean_d, on_square_d;
  float gold;
};
constexpr int64_t kSparseRecordFloats = sizeof(SparseRecord) / sizeof(float);

// A row, and what the teacher says of it.
struct SparseRow {
  Row row;  // without a teacher
  SparseForm form;
  int64_t entries;
  const int32_t* ids;    // [entries], global; below 0 where there is none
  const float* weights;  // [entries]
  float tail;
  // Room for as many: columns, logits and weights of the entries in this shard.
  int32_t* columns;
  float* logits;
  float* own_weights;
};

struct SparsePasses {
  void (*stats)(const SparseRow&, SparseRecord*);
  void (*grad)(const SparseRow&, const SparseRecord&);
};

using SparseTable = SparsePasses (*)(bool student_is_bf16);

SparsePasses ScalarSparsePasses(bool student_is_bf16);
#ifdef MINIPLM_KD_X86
SparsePasses Avx2SparsePasses(bool student_is_bf16);
SparsePasses Avx512SparsePasses(bool student_is_bf16);
SparsePasses Avx512Bf16SparsePasses(bool student_is_bf16);
#endif

}  // namespace kd
}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_KD_ROWS_H_
