// Python face of logit_codec.h: argument checks, GIL release, docstrings; no logic.

#include "logit_codec.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"

namespace py = pybind11;

namespace miniplm {
namespace {

template <typename T>
const T* Vector(const py::array& array, const char* name) {
  if (array.ndim() != 1 || !py::isinstance<py::array_t<T>>(array) ||
      (array.flags() & py::array::c_style) == 0 ||
      (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    throw py::type_error(std::string(name) + " must be a contiguous one-dimensional " +
                         std::string(py::str(py::dtype::of<T>())) + " array, aligned");
  }
  return static_cast<const T*>(array.data());
}

}  // namespace

void BindLogitCodec(py::module_& module) {
  module.def(
      "encode_logits",
      [](const py::array& counts, const py::array& ids, const py::array& log_probs, int64_t vocab,
         int bits) {
        const KeptLogits logits = {Vector<uint32_t>(counts, "counts"), Vector<int32_t>(ids, "ids"),
                                   Vector<float>(log_probs, "log_probs"), counts.size(),
                                   ids.size()};
        if (log_probs.size() != ids.size()) {
          throw py::value_error(std::to_string(log_probs.size()) + " log_probs for " +
                                std::to_string(ids.size()) + " ids");
        }
        std::vector<uint8_t> data;
        {
          py::gil_scoped_release unlocked;
          data = EncodeLogits(logits, vocab, bits);
        }
        return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
      },
      py::arg("counts"), py::arg("ids"), py::arg("log_probs"), py::kw_only(), py::arg("vocab"),
      py::arg("bits"),
      R"doc(Entries of some positions as bytes; csrc/logit_codec.h has the layout.

`counts` uint32[n], `ids` int32[nnz] ascending within a position, `log_probs` float32[nnz]. Releases
the GIL. ValueError: bits other than 1 to 16 and 32, ids or counts outside the vocabulary or out of
order, a log-prob that is not finite.)doc");
  module.def(
      "decode_logits",
      [](const py::buffer& data, int64_t positions, int64_t entries, int64_t vocab, int bits) {
        const py::buffer_info info = data.request();
        if (info.itemsize != 1 || info.ndim != 1 || (info.size > 0 && info.strides[0] != 1)) {
          throw py::type_error("data must be contiguous bytes");
        }
        // A count takes a byte, and each entry but the first of a position takes a bit or more:
        // damaged numbers make nobody allocate much.
        if (positions < 0 || positions > info.size || entries < 0 ||
            entries > positions + 8 * info.size) {
          throw py::value_error("it has too few bytes for its positions and entries");
        }
        py::array_t<uint32_t> counts(positions);
        py::array_t<int32_t> ids(entries);
        py::array_t<float> log_probs(entries);
        {
          uint32_t* to_counts = counts.mutable_data();
          int32_t* to_ids = ids.mutable_data();
          float* to_log_probs = log_probs.mutable_data();
          py::gil_scoped_release unlocked;
          DecodeLogits(static_cast<const uint8_t*>(info.ptr), info.size, vocab, bits, positions,
                       entries, to_counts, to_ids, to_log_probs);
        }
        return py::make_tuple(std::move(counts), std::move(ids), std::move(log_probs));
      },
      py::arg("data"), py::kw_only(), py::arg("positions"), py::arg("entries"), py::arg("vocab"),
      py::arg("bits"),
      R"doc((counts, ids, log_probs) that `encode_logits` was given, log-probs to its bits.

Any bytes are safe. Releases the GIL. ValueError: they are not what `encode_logits` writes.)doc");
}

}  // namespace miniplm
