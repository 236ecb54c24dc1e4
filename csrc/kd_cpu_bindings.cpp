// Enters kd_cpu.h into the module: checks what can be checked of raw addresses, releases the GIL.
// kernels/cpu.py looks at the tensors and keeps them alive during a call.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>

#include "bindings.h"
#include "kd_cpu.h"

namespace py = pybind11;

namespace miniplm {
namespace {

const std::map<std::string, kd::Form>& Forms() {
  static const std::map<std::string, kd::Form> forms = {
      {"", kd::Form::kNone},
      {"forward_kl", kd::Form::kForward},
      {"soft_nll", kd::Form::kForward},
      {"reverse_kl", kd::Form::kReverse},
      {"jsd", kd::Form::kJsd},
      {"skew_kl", kd::Form::kSkewKl},
      {"skew_rkl", kd::Form::kSkewRkl},
      {"tvd", kd::Form::kTvd},
      {"mse_logits", kd::Form::kMseLogits},
      {"mse_centered", kd::Form::kMseCentered},
      {"mse_log_probs", kd::Form::kMseLogProbs},
      {"brier", kd::Form::kBrier},
  };
  return forms;
}

const std::map<std::string, kd::SparseForm>& SparseForms() {
  static const std::map<std::string, kd::SparseForm> forms = {
      {"support", kd::SparseForm::kSupport},
      {"residual", kd::SparseForm::kResidual},
      {"uniform", kd::SparseForm::kUniform},
      {"on_support", kd::SparseForm::kOnSupport},
      {"square", kd::SparseForm::kSquare},
      {"square_logits", kd::SparseForm::kSquareLogits},
  };
  return forms;
}

void CheckSizes(int64_t rows, int64_t width, int64_t valid, int64_t student_stride, int threads) {
  if (rows < 0 || valid < 0 || valid > width || threads < 1) {
    throw py::value_error("rows " + std::to_string(rows) + ", width " + std::to_string(width) +
                          ", valid " + std::to_string(valid) + ", threads " +
                          std::to_string(threads) + ": impossible");
  }
  if (rows > 1 && student_stride < width) {
    throw py::value_error("rows of the student overlap");
  }
}

kd::Steps StepsOf(const std::string& steps) {
  const auto has = [&steps](char step) { return steps.find(step) != std::string::npos; };
  return {has('s'), has('i'), has('g')};
}

template <typename T>
T* At(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

kd::Matrix MatrixAt(uintptr_t address, int64_t row_stride, bool bf16) {
  return {At<unsigned char>(address), row_stride, bf16};
}

void RunKd(const std::string& steps, const std::string& variant, const std::string& form,
           float beta, float z_loss, uintptr_t student, int64_t student_stride, bool student_bf16,
           uintptr_t teacher, int64_t teacher_stride, bool teacher_bf16, int64_t rows,
           int64_t width, int64_t valid, int64_t first, uintptr_t labels, uintptr_t kd_weight,
           uintptr_t ce_weight, uintptr_t student_scale, uintptr_t teacher_scale, uintptr_t records,
           uintptr_t inners, int threads) {
  const auto found = Forms().find(form);
  if (found == Forms().end()) throw py::value_error("there is no native form of " + form);
  CheckSizes(rows, width, valid, student_stride, threads);
  const kd::Job job = {
      found->second,
      beta,
      z_loss,
      MatrixAt(student, student_stride, student_bf16),
      MatrixAt(teacher, teacher_stride, teacher_bf16),
      rows,
      width,
      valid,
      first,
      At<const int64_t>(labels),
      At<const float>(kd_weight),
      At<const float>(ce_weight),
      At<const float>(student_scale),
      At<const float>(teacher_scale),
      At<float>(records),
      At<float>(inners),
      threads,
  };
  py::gil_scoped_release unlocked;
  kd::Run(job, StepsOf(steps), variant);
}

void RunSparseKd(const std::string& steps, const std::string& variant, const std::string& form,
                 float z_loss, uintptr_t student, int64_t student_stride, bool student_bf16,
                 int64_t rows, int64_t width, int64_t valid, int64_t first, uintptr_t labels,
                 uintptr_t kd_weight, uintptr_t ce_weight, uintptr_t student_scale,
                 int64_t entries, uintptr_t ids, uintptr_t weights, uintptr_t tail,
                 uintptr_t records, int threads) {
  const auto found = SparseForms().find(form);
  if (found == SparseForms().end()) throw py::value_error("there is no native form of " + form);
  CheckSizes(rows, width, valid, student_stride, threads);
  if (entries < 0) throw py::value_error(std::to_string(entries) + " entries: impossible");
  const kd::SparseJob job = {
      found->second,
      z_loss,
      MatrixAt(student, student_stride, student_bf16),
      rows,
      width,
      valid,
      first,
      At<const int64_t>(labels),
      At<const float>(kd_weight),
      At<const float>(ce_weight),
      At<const float>(student_scale),
      entries,
      At<const int32_t>(ids),
      At<const float>(weights),
      At<const float>(tail),
      At<float>(records),
      threads,
  };
  py::gil_scoped_release unlocked;
  kd::Run(job, StepsOf(steps), variant);
}

}  // namespace

void BindKd(py::module_& module) {
  module.attr("KD_RECORD_FLOATS") = kd::kRecordFloats;
  module.def("kd_variants", &kd::Variants,
             "Instruction sets of this machine that token losses can use, the best one first.");
  module.def("kd_run", &RunKd, py::kw_only(), py::arg("steps"), py::arg("variant"), py::arg("form"),
             py::arg("beta"), py::arg("z_loss"), py::arg("student"), py::arg("student_stride"),
             py::arg("student_bf16"), py::arg("teacher"), py::arg("teacher_stride"),
             py::arg("teacher_bf16"), py::arg("rows"), py::arg("width"), py::arg("valid"),
             py::arg("first"), py::arg("labels"), py::arg("kd_weight"), py::arg("ce_weight"),
             py::arg("student_scale"), py::arg("teacher_scale"), py::arg("records"),
             py::arg("inners"), py::arg("threads"),
             R"doc(Token losses of a shard of logits, on raw addresses; see kernels/cpu.py.

`steps` is some of "s" (statistics into `records`), "i" (inner sums into `inners`) and "g" (the
gradient over the student's logits), done in this order on every row. Strides are in elements.
Nothing tells an address that is wrong from one that is right: use kernels/cpu.py.)doc");
  module.attr("SPARSE_KD_RECORD_FLOATS") = kd::kSparseRecordFloats;
  module.def("sparse_kd_run", &RunSparseKd, py::kw_only(), py::arg("steps"), py::arg("variant"),
             py::arg("form"), py::arg("z_loss"), py::arg("student"), py::arg("student_stride"),
             py::arg("student_bf16"), py::arg("rows"), py::arg("width"), py::arg("valid"),
             py::arg("first"), py::arg("labels"), py::arg("kd_weight"), py::arg("ce_weight"),
             py::arg("student_scale"), py::arg("entries"), py::arg("ids"), py::arg("weights"),
             py::arg("tail"), py::arg("records"), py::arg("threads"),
             R"doc(The same for a teacher of whom some tokens are known; see kernels/sparse_cpu.py.

`steps` is "s", "g" or "sg"; `ids` are int32, below 0 where a row has no entry.)doc");
}

}  // namespace miniplm
