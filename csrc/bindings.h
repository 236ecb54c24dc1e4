// What each *_bindings.cpp enters into the Python module; called by bindings.cpp.

#ifndef MEGATRON_MINIPLM_CSRC_BINDINGS_H_
#define MEGATRON_MINIPLM_CSRC_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace miniplm {

void BindJsonl(pybind11::module_& module);
void BindKd(pybind11::module_& module);
void BindLogitCodec(pybind11::module_& module);
void BindSelect(pybind11::module_& module);
void BindSubset(pybind11::module_& module);

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_BINDINGS_H_
