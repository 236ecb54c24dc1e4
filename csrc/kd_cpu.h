// Token losses on a shard of logits in memory: statistics, inner sums, gradients.
//
// What kernels/cpu.py documents, on raw addresses: no header of torch is needed, so that one build
// serves all of its versions. Rows are independent; OpenMP hands them out one by one.

#ifndef MEGATRON_MINIPLM_CSRC_KD_CPU_H_
#define MEGATRON_MINIPLM_CSRC_KD_CPU_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kd_rows.h"

namespace miniplm {
namespace kd {

// Rows of logits; columns are contiguous.
struct Matrix {
  unsigned char* data;
  int64_t row_stride;  // elements
  bool bf16;           // else float
};

// A token without weight (both 0) is not read; its record, inner sums and gradient become 0.
struct Job {
  Form form;
  float beta, z_loss;
  Matrix student;
  Matrix teacher;  // not read where form is kNone
  int64_t rows, width, valid, first;
  const int64_t* labels;  // [rows], global numbers of columns
  const float* kd_weight;
  const float* ce_weight;
  const float* student_scale;
  const float* teacher_scale;
  float* records;  // [rows, kRecordFloats]
  float* inners;   // [rows, 2]; may be null where the form needs none
  int threads;
};

// What is done to every row, in this order.
struct Steps {
  bool stats, inner, grad;
};

// The same for a teacher of whom some tokens are known; its steps are stats and grad.
struct SparseJob {
  SparseForm form;
  float z_loss;
  Matrix student;
  int64_t rows, width, valid, first;
  const int64_t* labels;
  const float* kd_weight;
  const float* ce_weight;
  const float* student_scale;
  int64_t entries;
  const int32_t* ids;    // [rows, entries], global numbers of columns; below 0: none
  const float* weights;  // [rows, entries]
  const float* tail;     // [rows]
  float* records;        // [rows, kSparseRecordFloats]
  int threads;
};

// Instruction sets that this machine can run, the best one first; "scalar" is the last.
std::vector<std::string> Variants();

// `variant` must be one of Variants().
void Run(const Job& job, Steps steps, const std::string& variant);
void Run(const SparseJob& job, Steps steps, const std::string& variant);

}  // namespace kd
}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_KD_CPU_H_
