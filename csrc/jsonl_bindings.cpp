// Python face of jsonl.h: strings of Python from what was scanned without the GIL.

#include "bindings.h"

#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "jsonl.h"

namespace py = pybind11;

namespace miniplm {
namespace {

constexpr size_t kMostNames = 1 << 16;  // domains that are kept as Python strings

// A new Python string; null, without an error set, if the bytes are no UTF-8.
PyObject* NewString(const Unescaped& text) {
  const Py_ssize_t size = static_cast<Py_ssize_t>(text.size);
  if (!text.ascii) {
    PyObject* decoded = PyUnicode_DecodeUTF8(text.data, size, "strict");
    if (decoded == nullptr && PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) PyErr_Clear();
    if (decoded == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return decoded;
  }
  PyObject* made = PyUnicode_New(size, 127);
  if (made == nullptr) throw py::error_already_set();
  if (size > 0) std::memcpy(PyUnicode_1BYTE_DATA(made), text.data, text.size);
  return made;
}

class Reader {
 public:
  Reader(std::string text_key, const std::optional<std::string>& domain_key)
      : scanner_(std::move(text_key), domain_key.has_value(), domain_key.value_or("")),
        has_domain_(domain_key.has_value()) {}

  py::tuple Read(const py::bytes& block) {
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(block.ptr(), &data, &size) != 0) throw py::error_already_set();
    ScannedBlock scanned;
    {
      py::gil_scoped_release unlocked;
      scanned = scanner_.Scan(data, static_cast<size_t>(size));
    }
    py::list texts, domains, unusual;
    int64_t empty = 0;
    for (const ScannedLine& line : scanned.lines) {
      const py::object domain = line.plain && has_domain_ ? Domain(line.domain) : py::none();
      const bool known = line.plain && !(has_domain_ && domain.is_none());
      const py::object text =
          known ? py::reinterpret_steal<py::object>(NewString(line.text)) : py::object();
      if (!text) {
        unusual.append(py::make_tuple(texts.size(), line.number,
                                      py::bytes(line.begin, line.size)));
      } else if (line.text.size == 0) {
        ++empty;
      } else {
        texts.append(text);
        if (has_domain_) domains.append(domain);
      }
    }
    return py::make_tuple(texts, domains, unusual, empty, scanned.lines.size(),
                          scanned.num_lines);
  }

 private:
  // The name as a Python string, the same one each time; None for one that is empty or no UTF-8.
  py::object Domain(const Unescaped& name) {
    if (name.size == 0) return py::none();
    std::string key(name.data, name.size);
    const auto found = names_.find(key);
    if (found != names_.end()) return found->second;
    PyObject* made = NewString(name);
    if (made == nullptr) return py::none();
    py::object owned = py::reinterpret_steal<py::object>(made);
    if (names_.size() < kMostNames) names_.emplace(std::move(key), owned);
    return owned;
  }

  const RecordScanner scanner_;
  const bool has_domain_;
  std::unordered_map<std::string, py::object> names_;
};

}  // namespace

void BindJsonl(py::module_& module) {
  py::class_<Reader>(module, "RecordReader", R"doc(Texts and domains of lines of JSON.

`text_key` and `domain_key` (None: no domain) are names, or paths of names with dots. One thread
at a time may use a reader.)doc")
      .def(py::init<std::string, const std::optional<std::string>&>(), py::arg("text_key"),
           py::arg("domain_key"))
      .def("read", &Reader::Read, py::arg("block"),
           R"doc(What is in whole lines: (texts, domains, unusual, empty, records, lines).

`texts` (and `domains`, if there is a key) of the plain records with a text, in order; `empty` is
how many had an empty one. `unusual` has (place in `texts`, line number from 0, line) of every line
that is left to a complete parser. `records` are all lines that are not blank. Scans without the
GIL.)doc");
}

}  // namespace miniplm
