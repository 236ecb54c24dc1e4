// The Python module megatron_miniplm._C: argument checks, GIL release and docstrings; no logic.

#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "pack.h"

namespace py = pybind11;

namespace {

// A one-dimensional contiguous array of exactly T; never converts, so nothing is copied unseen.
template <typename T>
void CheckVector(const py::array& array, const char* name) {
  const int flags = array.flags();
  if (array.ndim() != 1 || !py::isinstance<py::array_t<T>>(array) ||
      (flags & py::array::c_style) == 0 ||
      (flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    throw py::type_error(std::string(name) + " must be a contiguous one-dimensional " +
                         std::string(py::str(py::dtype::of<T>())) + " array, aligned");
  }
}

// A copy of an array as a vector.
template <typename T>
std::vector<T> Copy(const py::array& array, const char* name) {
  CheckVector<T>(array, name);
  const T* data = static_cast<const T*>(array.data());
  return std::vector<T>(data, data + array.size());
}

// A vector's memory as an array; nothing is copied.
template <typename T>
py::array_t<T> Hand(std::vector<T> values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owned->data();
  const py::ssize_t size = static_cast<py::ssize_t>(owned->size());
  py::capsule owner(owned.get(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  owned.release();
  return py::array_t<T>(size, data, owner);
}

// Code points and UTF-8 bytes of each text; the bytes of a text are kept by it for later users.
py::tuple TextSizes(const py::list& texts) {
  std::vector<int64_t> characters;
  std::vector<int64_t> bytes;
  characters.reserve(texts.size());
  bytes.reserve(texts.size());
  for (const py::handle& text : texts) {
    if (!PyUnicode_Check(text.ptr())) throw py::type_error("texts must be strings");
    Py_ssize_t size = 0;
    if (PyUnicode_AsUTF8AndSize(text.ptr(), &size) == nullptr) throw py::error_already_set();
    characters.push_back(PyUnicode_GET_LENGTH(text.ptr()));
    bytes.push_back(size);
  }
  return py::make_tuple(Hand(std::move(characters)), Hand(std::move(bytes)));
}

// A packer that one thread at a time may call; the others wait without the GIL.
class LockedPacker {
 public:
  LockedPacker(const py::array& flags, const py::array& byte_lengths, int32_t eod_id,
               int64_t seq_length, int64_t max_chunks, int64_t bytes_per_token, bool append_eod,
               bool flush_tails, bool keep_tokens)
      : packer_({Copy<uint8_t>(flags, "flags"), Copy<uint16_t>(byte_lengths, "byte_lengths"),
                 eod_id, seq_length, max_chunks, bytes_per_token, append_eod, flush_tails,
                 keep_tokens}) {}

  py::tuple Add(const py::array& ids, const py::array& offsets, const py::array& domains) {
    CheckVector<int32_t>(ids, "ids");
    CheckVector<int64_t>(offsets, "offsets");
    CheckVector<uint16_t>(domains, "domains");
    if (offsets.size() != domains.size() + 1) {
      throw py::value_error(std::to_string(offsets.size()) + " offsets for " +
                            std::to_string(domains.size()) + " documents: must be one more");
    }
    const miniplm::DocumentBatch batch = {
        static_cast<const int32_t*>(ids.data()),      ids.size(),
        static_cast<const int64_t*>(offsets.data()),  static_cast<const uint16_t*>(domains.data()),
        domains.size(),
    };
    return Locked([&batch](miniplm::Packer& packer) { return packer.Add(batch); });
  }

  py::tuple Finish() {
    return Locked([](miniplm::Packer& packer) { return packer.Finish(); });
  }

  py::dict counters() {
    miniplm::PackerCounters now;
    {
      py::gil_scoped_release unlocked;
      const std::lock_guard<std::mutex> lock(mutex_);
      now = packer_.counters();
    }
    py::dict named;
    named["tokens_in"] = now.tokens_in;
    named["instances"] = now.instances;
    named["tokens"] = now.tokens;
    named["pushed_back_tokens"] = now.pushed_back_tokens;
    named["uncut_instances"] = now.uncut_instances;
    named["dropped_short_tokens"] = now.dropped_short_tokens;
    named["dropped_separator_instances"] = now.dropped_separator_instances;
    named["dropped_separator_tokens"] = now.dropped_separator_tokens;
    named["overlong_documents"] = now.overlong_documents;
    named["dropped_overlong_tokens"] = now.dropped_overlong_tokens;
    named["dropped_tail_tokens"] = now.dropped_tail_tokens;
    named["flushed_tails"] = now.flushed_tails;
    named["pending_tokens"] = now.pending_tokens;
    named["documents_without_tokens"] = now.documents_without_tokens;
    named["separators_in_text"] = now.separators_in_text;
    named["text_bytes_in_tokens"] = now.text_bytes_in_tokens;
    return named;
  }

  py::list domain_counters() {
    std::vector<miniplm::DomainCounters> now;
    {
      py::gil_scoped_release unlocked;
      const std::lock_guard<std::mutex> lock(mutex_);
      now = packer_.domain_counters();
    }
    py::list rows;
    for (const miniplm::DomainCounters& one : now) {
      py::dict named;
      named["tokens"] = one.tokens;
      named["instances"] = one.instances;
      named["packed_tokens"] = one.packed_tokens;
      named["packed_text_bytes"] = one.packed_text_bytes;
      rows.append(named);
    }
    return rows;
  }

 private:
  template <typename Call>
  py::tuple Locked(const Call& call) {
    miniplm::PackedBatch packed;
    {
      py::gil_scoped_release unlocked;
      const std::lock_guard<std::mutex> lock(mutex_);
      packed = call(packer_);
    }
    const py::ssize_t count = static_cast<py::ssize_t>(packed.num_tokens);
    py::array tokens = packer_.bytes_per_token() == 2
                           ? HandTokens<uint16_t>(packed.tokens.release(), count)
                           : HandTokens<int32_t>(packed.tokens.release(), count);
    return py::make_tuple(std::move(tokens), Hand(std::move(packed.lengths)),
                          Hand(std::move(packed.domains)), Hand(std::move(packed.starts)));
  }

  template <typename T>
  static py::array HandTokens(unsigned char* memory, py::ssize_t count) {
    if (memory == nullptr) return py::array_t<T>(0);
    py::capsule owner(memory, [](void* data) { delete[] static_cast<unsigned char*>(data); });
    return py::array_t<T>(count, reinterpret_cast<T*>(memory), owner);
  }

  miniplm::Packer packer_;
  std::mutex mutex_;
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native parts of megatron_miniplm: what is too slow in Python, on numpy arrays.";

  // A failed write is an OSError with its errno, as from Python's own files.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      const py::tuple arguments = py::make_tuple(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });

  module.def("text_sizes", &TextSizes, py::arg("texts"),
             R"doc(Characters and UTF-8 bytes (int64[n] each) of a list of strings.

UnicodeEncodeError: a string with a lone surrogate.)doc");

  py::class_<LockedPacker>(module, "Packer", R"doc(Packs documents into instances; see data/packing.py.

`flags` (uint8[V]) and `byte_lengths` (uint16[V]) describe the tokens. Calls release the GIL and
wait for one another.)doc")
      .def(py::init<const py::array&, const py::array&, int32_t, int64_t, int64_t, int64_t, bool,
                    bool, bool>(),
           py::kw_only(), py::arg("flags"), py::arg("byte_lengths"), py::arg("eod_id"),
           py::arg("seq_length"), py::arg("max_chunks"), py::arg("bytes_per_token"),
           py::arg("append_eod"), py::arg("flush_tails"), py::arg("keep_tokens"))
      .def("add", &LockedPacker::Add, py::arg("ids"), py::arg("offsets"), py::arg("domains"),
           R"doc(Append documents; return (tokens, lengths, domains, starts) of what they complete.

`ids` int32[total], `offsets` int64[n + 1] into it, `domains` uint16[n]. Returned: tokens of the
instances end to end (uint16 or int32), int32, uint16 and int64 (start among all tokens that the
domain was given), one per instance. ValueError, and nothing has changed: ids outside the
vocabulary, offsets that descend or lead outside.)doc")
      .def("finish", &LockedPacker::Finish,
           "Empty all buffers, domains in ascending order; the tails as from `add`.")
      .def("counters", &LockedPacker::counters, "Counts by name, over all calls.")
      .def("domain_counters", &LockedPacker::domain_counters,
           "Counts by name for each domain number up to the highest one seen.");

  miniplm::BindJsonl(module);
  miniplm::BindKd(module);
  miniplm::BindLogitCodec(module);
  miniplm::BindSelect(module);
  miniplm::BindSubset(module);
}
