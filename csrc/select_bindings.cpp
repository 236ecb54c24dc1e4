// Python face of select.h: argument checks, GIL release and docstrings; no logic.

#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "select.h"

namespace py = pybind11;

namespace miniplm {
namespace {

template <typename T>
const T* Column(const std::optional<py::array>& array, const char* name, int64_t count,
                bool aligned = true) {
  if (!array) return nullptr;
  const int flags = array->flags();
  if (array->ndim() != 1 || !py::isinstance<py::array_t<T>>(*array) ||
      (flags & py::array::c_style) == 0 ||
      (aligned && (flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0)) {
    throw py::type_error(std::string(name) + " must be a contiguous one-dimensional " +
                         std::string(py::str(py::dtype::of<T>())) + " array");
  }
  if (array->size() != count) {
    throw py::value_error(std::string(name) + " has " + std::to_string(array->size()) +
                          " rows, but there are " + std::to_string(count));
  }
  return static_cast<const T*>(array->data());
}

using Optional = std::optional<py::array>;

// Columns of consecutive rows as Python hands them over; holds them while they are read.
struct Rows {
  Rows(int64_t count, int rule, bool per_token, Optional teacher_sum, Optional teacher_tokens,
       Optional reference_sum, Optional reference_tokens, Optional keys, Optional ids,
       int64_t first_id, uint64_t random_state, Optional eligible_tokens, int32_t least_tokens,
       Optional weights, Optional strata, bool drop_behind)
      : held{teacher_sum, teacher_tokens,  reference_sum, reference_tokens, keys,
             ids,         eligible_tokens, weights,       strata} {
    if (rule < 0 || rule > 4) throw py::value_error("no rule has number " + std::to_string(rule));
    if (count < 0) throw py::value_error("a negative number of rows");
    rows.count = count;
    rows.rule = static_cast<KeyRule>(rule);
    rows.per_token = per_token;
    rows.teacher_sum = Column<float>(teacher_sum, "teacher_sum", count);
    rows.teacher_tokens = Column<int32_t>(teacher_tokens, "teacher_tokens", count);
    rows.reference_sum = Column<float>(reference_sum, "reference_sum", count);
    rows.reference_tokens = Column<int32_t>(reference_tokens, "reference_tokens", count);
    rows.keys = Column<double>(keys, "keys", count);
    rows.ids = Column<int64_t>(ids, "ids", count);
    rows.first_id = first_id;
    rows.random_state = random_state;
    rows.eligible_tokens = Column<int32_t>(eligible_tokens, "eligible_tokens", count);
    rows.least_tokens = least_tokens;
    rows.weights = reinterpret_cast<const unsigned char*>(
        Column<int32_t>(weights, "weights", count, /*aligned=*/false));
    rows.strata = Column<uint16_t>(strata, "strata", count);
    rows.drop_behind = drop_behind;
    const bool teacher = rows.teacher_sum != nullptr && rows.teacher_tokens != nullptr;
    const bool reference = rows.reference_sum != nullptr && rows.reference_tokens != nullptr;
    if ((rows.teacher_sum == nullptr) != (rows.teacher_tokens == nullptr) ||
        (rows.reference_sum == nullptr) != (rows.reference_tokens == nullptr)) {
      throw py::value_error("scores are a column of sums and one of tokens, not one alone");
    }
    const bool complete[] = {teacher && reference, teacher, reference, true,
                             rows.keys != nullptr};
    if (!complete[rule]) {
      throw py::value_error("rule " + std::to_string(rule) + " lacks a column that it reads");
    }
  }
  KeyRows rows;
  std::vector<Optional> held;
};

void CheckStrata(const KeyScan& scan, size_t size, const char* name) {
  if (size != static_cast<size_t>(scan.num_strata())) {
    throw py::value_error(std::string(name) + " has " + std::to_string(size) +
                          " values, but there are " + std::to_string(scan.num_strata()) +
                          " strata");
  }
}

py::array_t<int64_t> Totals(const KeyScan& scan) {
  py::array_t<int64_t> table({scan.num_strata(), 7});
  auto out = table.mutable_unchecked<2>();
  for (int d = 0; d < scan.num_strata(); ++d) {
    const StratumTotals& totals = scan.totals()[static_cast<size_t>(d)];
    const int64_t values[7] = {totals.rows,         totals.eligible_rows, totals.eligible_weight,
                               totals.above_rows,   totals.above_weight,  totals.inside_rows,
                               totals.inside_weight};
    for (int i = 0; i < 7; ++i) out(d, i) = values[i];
  }
  return table;
}

}  // namespace

void BindSelect(py::module_& module) {
  py::class_<Rows>(module, "KeyRows", R"doc(Columns of consecutive rows, from which keys are made.

`rule`: 0 difference, 1 teacher, 2 reference, 3 random, 4 given keys. Scores are float32 sums and
int32 counts, `keys` float64, `ids` int64 (None: first_id and so on), `weights` int32 that may be
unaligned (None: 1 a row), `strata` uint16. Rows with fewer than `least_tokens` `eligible_tokens`
are left out. `drop_behind` gives pages of score columns back once read: for read-only file
mappings only (other memory would be lost).)doc")
      .def(py::init<int64_t, int, bool, Optional, Optional, Optional, Optional, Optional, Optional,
                    int64_t, uint64_t, Optional, int32_t, Optional, Optional, bool>(),
           py::arg("count"), py::kw_only(), py::arg("rule"), py::arg("per_token") = true,
           py::arg("teacher_sum") = py::none(), py::arg("teacher_tokens") = py::none(),
           py::arg("reference_sum") = py::none(), py::arg("reference_tokens") = py::none(),
           py::arg("keys") = py::none(), py::arg("ids") = py::none(), py::arg("first_id") = 0,
           py::arg("random_state") = 0, py::arg("eligible_tokens") = py::none(),
           py::arg("least_tokens") = 0, py::arg("weights") = py::none(),
           py::arg("strata") = py::none(), py::arg("drop_behind") = false);

  using Scan = py::class_<KeyScan>;
  Scan(module, "KeyScan", R"doc(One pass over the keys of one shard, against a bracket a stratum.

With `buckets_log2` 0, rows above the bracket are marked and rows inside are kept as candidates, at
most `max_candidates`; otherwise the rows inside are only counted into 2**buckets_log2 equal ranges
of key images. Every method releases the GIL.)doc")
      .def(py::init<int64_t, std::vector<double>, std::vector<double>, int64_t, int>(),
           py::arg("num_rows"), py::kw_only(), py::arg("low"), py::arg("high"),
           py::arg("max_candidates"), py::arg("buckets_log2") = 0)
      .def(
          "add",
          [](KeyScan& scan, int64_t first, const Rows& rows, int threads) {
            py::gil_scoped_release unlocked;
            return scan.Add(first, rows.rows, threads);
          },
          py::arg("first"), py::arg("rows"), py::kw_only(), py::arg("threads") = 0,
          "Add the rows from `first` on, a multiple of 64; the first unusable row, or -1.")
      .def(
          "choose",
          [](KeyScan& scan, const Rows& rows, const std::vector<double>& threshold,
             const std::vector<int64_t>& taken, const std::vector<int64_t>& budget) {
            CheckStrata(scan, threshold.size(), "threshold");
            CheckStrata(scan, taken.size(), "taken");
            CheckStrata(scan, budget.size(), "budget");
            if (rows.rows.count != scan.num_rows()) throw py::value_error("rows of another shard");
            py::gil_scoped_release unlocked;
            scan.Choose(threshold, taken, budget, rows.rows);
          },
          py::arg("rows"), py::kw_only(), py::arg("threshold"), py::arg("taken"),
          py::arg("budget"),
          "Mark the candidates above `threshold`, and equal ones in row order within `budget`.")
      .def(
          "candidate_histogram",
          [](const KeyScan& scan, const std::vector<double>& low, const std::vector<double>& high,
             int log2) {
            CheckStrata(scan, low.size(), "low");
            CheckStrata(scan, high.size(), "high");
            if (log2 < 1 || log2 > 20) throw py::value_error("log2 must be 1 to 20");
            py::array_t<int64_t> weights({scan.num_strata(), 1 << log2});
            int64_t* out = weights.mutable_data();
            std::fill_n(out, weights.size(), 0);
            py::gil_scoped_release unlocked;
            scan.CandidateHistogram(low, high, log2, out);
            return weights;
          },
          py::kw_only(), py::arg("low"), py::arg("high"), py::arg("log2"),
          "int64[D, 2**log2]: weight of the candidates in equal ranges of images.")
      .def("tie_weights", &KeyScan::TieWeights, py::arg("threshold"),
           py::call_guard<py::gil_scoped_release>(),
           "Weight of the rows inside that are equal to the threshold, one a stratum.")
      .def_property_readonly("totals", &Totals,
                             "int64[D, 7]: rows, eligible rows and weight, rows and weight above "
                             "the bracket, rows and weight inside.")
      .def_property_readonly(
          "histogram",
          [](const KeyScan& scan) {
            const auto& found = scan.histogram();
            const py::ssize_t strata = scan.num_strata();
            const py::ssize_t buckets = static_cast<py::ssize_t>(found.size()) / strata;
            return py::array_t<int64_t>({strata, buckets}, found.data());
          },
          "int64[D, 2**buckets_log2]: weight of the rows inside, by range of images.")
      .def_property_readonly(
          "mask",
          [](py::object self) {
            const KeyScan& scan = self.cast<const KeyScan&>();
            // A view: the scan lives as long as it.
            py::array_t<uint8_t> view((scan.num_rows() + 7) / 8,
                                      reinterpret_cast<const uint8_t*>(scan.mask().data()), self);
            view.attr("flags").attr("writeable") = false;
            return view;
          },
          "uint8[ceil(N / 8)]: bit r % 8 of byte r // 8 is set if row r is marked.")
      .def_property_readonly("overflowed", &KeyScan::overflowed, "More inside than were kept.")
      .def_property_readonly("num_candidates", &KeyScan::num_candidates, "Candidates kept.")
      .def_property_readonly("lowest_kept", &KeyScan::lowest_kept,
                             "Lowest key that is marked; infinity if none is.");

  module.def("key_images", [](const std::vector<double>& keys) {
    std::vector<uint64_t> images;
    for (const double key : keys) images.push_back(KeyImage(key));
    return images;
  }, py::arg("keys"), "Unsigned integers that order as the keys do.");

  module.def(
      "tally_rows",
      [](const py::array& lengths, const Optional& domains, const Optional& mask,
         int64_t num_domains, int64_t longest) {
        const int64_t count = lengths.size();
        TallyColumns rows;
        rows.count = count;
        rows.lengths = reinterpret_cast<const unsigned char*>(
            Column<int32_t>(lengths, "lengths", count, /*aligned=*/false));
        rows.domains = Column<uint16_t>(domains, "domains", count);
        const uint8_t* bits = Column<uint8_t>(mask, "mask", (count + 7) / 8);
        if (num_domains < 1 || longest < 0) throw py::value_error("nothing to tally into");
        Tally tally;
        tally.domains.assign(static_cast<size_t>(4 * num_domains), 0);
        tally.lengths.assign(static_cast<size_t>(2 * (longest + 1)), 0);
        {
          py::gil_scoped_release unlocked;
          TallyRows(rows, bits, &tally);
        }
        return py::make_tuple(
            py::array_t<int64_t>({num_domains, int64_t{2}, int64_t{2}}, tally.domains.data()),
            py::array_t<int64_t>({longest + 1, int64_t{2}}, tally.lengths.data()));
      },
      py::arg("lengths"), py::kw_only(), py::arg("domains") = py::none(),
      py::arg("mask") = py::none(), py::arg("num_domains") = 1, py::arg("longest"),
      R"doc(Counts of rows dropped [0] and kept [1], by domain and by length.

`lengths` is int32[N] (maybe unaligned), `domains` uint16[N], `mask` a `RowMask`'s bits. Returns
int64[D, 2, 2] (rows, then tokens, of each domain) and int64[longest + 1, 2] (rows of each length).
ValueError: a length or domain out of range. Releases the GIL.)doc");
}

}  // namespace miniplm
