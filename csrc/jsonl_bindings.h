#ifndef MEGATRON_MINIPLM_CSRC_JSONL_BINDINGS_H_
#define MEGATRON_MINIPLM_CSRC_JSONL_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace miniplm {

void BindJsonl(pybind11::module_& module);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_JSONL_BINDINGS_H_
