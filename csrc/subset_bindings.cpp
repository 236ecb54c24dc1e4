// Python face of subset.h: argument checks, GIL release, docstrings; no logic.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "files.h"
#include "subset.h"

namespace py = pybind11;

namespace miniplm {
namespace {

template <typename T>
const unsigned char* Bytes(const py::array& array, const char* name, int64_t count) {
  if (array.ndim() != 1 || !py::isinstance<py::array_t<T>>(array) ||
      (array.flags() & py::array::c_style) == 0) {
    throw py::type_error(std::string(name) + " must be a contiguous one-dimensional " +
                         std::string(py::str(py::dtype::of<T>())) + " array");
  }
  if (array.size() != count) {
    throw py::value_error(std::string(name) + " has " + std::to_string(array.size()) +
                          " elements, expected " + std::to_string(count));
  }
  return static_cast<const unsigned char*>(array.data());
}

IndexView View(const py::array& lengths, const py::array& pointers, uint8_t dtype_code,
               int64_t bytes_per_token, int64_t bin_bytes) {
  const int64_t count = lengths.size();
  return {Bytes<int32_t>(lengths, "lengths", count), Bytes<int64_t>(pointers, "pointers", count),
          count, bin_bytes, bytes_per_token, dtype_code};
}

ChosenRows Chosen(const py::array& mask, int64_t count) {
  return {Bytes<uint8_t>(mask, "mask", (count + 7) / 8), count};
}

Sequences WithTokens(const py::array& lengths, const py::array& pointers, const py::array& tokens,
                     int64_t bytes_per_token) {
  const unsigned char* bin = Bytes<uint8_t>(tokens, "tokens", tokens.size());
  return {View(lengths, pointers, 0, bytes_per_token, tokens.size()), bin};
}

}  // namespace

void BindSubset(py::module_& module) {
  module.def(
      "write_masked_index",
      [](int descriptor, const py::array& lengths, const py::array& pointers,
         const py::array& mask, uint8_t dtype_code, int64_t bytes_per_token, int64_t bin_bytes,
         bool contiguous, bool drop_behind, int threads) {
        const IndexView parent = View(lengths, pointers, dtype_code, bytes_per_token, bin_bytes);
        const ChosenRows chosen = Chosen(mask, parent.count);
        WrittenIndex written;
        {
          py::gil_scoped_release unlocked;
          written =
              WriteMaskedIndex(descriptor, parent, chosen, contiguous, drop_behind, threads);
        }
        return py::make_tuple(written.num_rows, written.num_tokens);
      },
      py::arg("descriptor"), py::kw_only(), py::arg("lengths"), py::arg("pointers"),
      py::arg("mask"), py::arg("dtype_code"), py::arg("bytes_per_token"), py::arg("bin_bytes"),
      py::arg("contiguous") = false, py::arg("drop_behind") = false, py::arg("threads") = 0,
      R"doc(Write the .idx of the rows in `mask` into an empty file; return (rows, tokens).

`mask` is uint8[ceil(N / 8)], bit r % 8 of byte r // 8. `contiguous`: pointers of a .bin that holds
just these rows, else the parent's. `drop_behind` only for a read-only file mapping. Releases the
GIL. ValueError: a chosen sequence outside a .bin of `bin_bytes` bytes. OSError: a write failed.)doc");
  module.def(
      "copy_chosen_tokens",
      [](int source, int target, const py::array& lengths, const py::array& pointers,
         const py::array& mask, int64_t bytes_per_token, int64_t bin_bytes, bool drop_behind,
         int threads) {
        const IndexView parent = View(lengths, pointers, 0, bytes_per_token, bin_bytes);
        const ChosenRows chosen = Chosen(mask, parent.count);
        py::gil_scoped_release unlocked;
        return CopyChosenTokens(source, target, parent, chosen, drop_behind, threads);
      },
      py::arg("source"), py::arg("target"), py::kw_only(), py::arg("lengths"),
      py::arg("pointers"), py::arg("mask"), py::arg("bytes_per_token"), py::arg("bin_bytes"),
      py::arg("drop_behind") = false, py::arg("threads") = 0,
      R"doc(Put the tokens of the rows in `mask` into the empty file `target`; return their bytes.

`source` is the parent's .bin. Releases the GIL. ValueError: a chosen sequence outside a .bin of
`bin_bytes` bytes. OSError: reading or writing failed, or the .bin ended early.)doc");
  module.def("start_writeback", &StartWriteback, py::arg("descriptor"), py::arg("offset"),
             py::arg("size"), py::call_guard<py::gil_scoped_release>(),
             "Send a written range on its way to the disk without waiting; a hint.");
  module.def(
      "first_difference",
      [](const py::array& lengths, const py::array& pointers, const py::array& tokens,
         int64_t first, const py::array& other_lengths, const py::array& other_pointers,
         const py::array& other_tokens, const py::array_t<int64_t, py::array::c_style>& other_rows,
         int64_t bytes_per_token) {
        const Sequences left = WithTokens(lengths, pointers, tokens, bytes_per_token);
        const Sequences right =
            WithTokens(other_lengths, other_pointers, other_tokens, bytes_per_token);
        const int64_t* rows = other_rows.data();
        const int64_t count = other_rows.size();
        py::gil_scoped_release unlocked;
        return FirstDifference(left, first, right, rows, count);
      },
      py::kw_only(), py::arg("lengths"), py::arg("pointers"), py::arg("tokens"), py::arg("first"),
      py::arg("other_lengths"), py::arg("other_pointers"), py::arg("other_tokens"),
      py::arg("other_rows").noconvert(), py::arg("bytes_per_token"),
      R"doc(The first i where row `first` + i and row `other_rows`[i] of the other differ, or -1.

`tokens` (uint8, the .bin) and `other_tokens` are compared byte by byte. Releases the GIL.
ValueError: a row that is not there, or a sequence outside its .bin.)doc");
}

}  // namespace miniplm
