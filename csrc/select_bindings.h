// Enters what select_bindings.cpp and, through it, subset_bindings.cpp define; called by
// bindings.cpp.

#ifndef MEGATRON_MINIPLM_CSRC_SELECT_BINDINGS_H_
#define MEGATRON_MINIPLM_CSRC_SELECT_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace miniplm {

void BindSelect(pybind11::module_& module);
void BindSubset(pybind11::module_& module);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_SELECT_BINDINGS_H_
