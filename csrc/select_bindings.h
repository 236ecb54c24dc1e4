// Enters what the other *_bindings.cpp define; called by bindings.cpp (BindSubset by BindSelect).

#ifndef MEGATRON_MINIPLM_CSRC_SELECT_BINDINGS_H_
#define MEGATRON_MINIPLM_CSRC_SELECT_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace miniplm {

void BindSelect(pybind11::module_& module);
void BindKd(pybind11::module_& module);
void BindSubset(pybind11::module_& module);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_SELECT_BINDINGS_H_
