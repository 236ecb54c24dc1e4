// The Python module megatron_miniplm._C: argument checks, GIL release and docstrings; no logic.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "subset.h"

namespace py = pybind11;

namespace {

// A one-dimensional contiguous array of exactly T; never converts, so nothing is copied unseen.
// The array may be unaligned: it is handed on as bytes, or must be aligned where T is read.
template <typename T>
void CheckVector(const py::array& array, const char* name, bool aligned = false) {
  const int flags = array.flags();
  const bool well_formed = array.ndim() == 1 && py::isinstance<py::array_t<T>>(array) &&
                           (flags & py::array::c_style) != 0 &&
                           (!aligned || (flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0);
  if (!well_formed) {
    throw py::type_error(std::string(name) + " must be a contiguous one-dimensional " +
                         std::string(py::str(py::dtype::of<T>())) + " array" +
                         (aligned ? ", aligned" : ""));
  }
}

int64_t WriteViewIndex(int descriptor, const py::array& lengths, const py::array& pointers,
                       const py::array& rows, uint8_t dtype_code, int64_t bytes_per_token,
                       int64_t bin_bytes) {
  CheckVector<int32_t>(lengths, "lengths");
  CheckVector<int64_t>(pointers, "pointers");
  CheckVector<int64_t>(rows, "rows", /*aligned=*/true);
  if (lengths.size() != pointers.size()) {
    throw py::value_error("lengths has " + std::to_string(lengths.size()) +
                          " elements, but pointers has " + std::to_string(pointers.size()));
  }
  const miniplm::IndexView parent = {
      static_cast<const unsigned char*>(lengths.data()),
      static_cast<const unsigned char*>(pointers.data()),
      lengths.size(),
      bin_bytes,
      bytes_per_token,
      dtype_code,
  };
  const int64_t* chosen = static_cast<const int64_t*>(rows.data());
  const int64_t num_rows = rows.size();
  py::gil_scoped_release unlocked;
  return miniplm::WriteViewIndex(descriptor, parent, chosen, num_rows);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native parts of megatron_miniplm: what is too slow in Python, on numpy arrays.";

  // A failed write is an OSError with its errno, as from Python's own files.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetFromErrno(PyExc_OSError);
    }
  });

  module.def("write_view_index", &WriteViewIndex, py::arg("descriptor"), py::kw_only(),
             py::arg("lengths"), py::arg("pointers"), py::arg("rows"), py::arg("dtype_code"),
             py::arg("bytes_per_token"), py::arg("bin_bytes"),
             R"doc(Write a subset's .idx to an open file descriptor; return its number of tokens.

`lengths` (int32[N], tokens) and `pointers` (int64[N], bytes) are the parent's index, `rows`
(int64[K], strictly ascending) what is chosen of it; 20 K + 42 bytes are written. Releases the
GIL. ValueError: rows that do not ascend or are out of range, or a chosen sequence outside a .bin
of `bin_bytes` bytes. OSError: a write failed.)doc");
}
