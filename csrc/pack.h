// Packs tokenised documents into instances, cut at sentence ends.
//
// The rules are stated once, in megatron_miniplm/data/packing.py; packing_reference.py beside it is
// the same in numpy, and the two are compared token by token and counter by counter.
//
// Cost: every chunk is scanned backwards for its last cut, and what becomes an instance is copied
// out once, from where the document lies; only the ends of documents go through the buffer of their
// domain. A token is scanned at most twice: if the rest of a chunk after its cut is scanned again
// and found without one, the whole next chunk is taken. So the work is linear in the tokens,
// whatever they are.

#ifndef MEGATRON_MINIPLM_CSRC_PACK_H_
#define MEGATRON_MINIPLM_CSRC_PACK_H_

#include <cstdint>
#include <memory>
#include <vector>

namespace miniplm {

// Bits of PackerOptions::flags.
constexpr uint8_t kCutAlways = 1;    // a cut wherever it stands
constexpr uint8_t kCutIfSpace = 2;   // a cut if it or the next token has a space, or none follows
constexpr uint8_t kHasSpace = 4;

struct PackerOptions {
  std::vector<uint8_t> flags;          // one a token id
  std::vector<uint16_t> byte_lengths;  // bytes of text that each token id stands for
  int32_t eod_id;                      // the separator
  int64_t seq_length;                  // an instance has at most one token more
  int64_t max_chunks;                  // of one document; the rest of it is dropped
  int64_t bytes_per_token;             // of the output: 2 (uint16) or 4 (int32)
  bool append_eod;                     // put the separator after every document
  bool flush_tails;                    // make an instance of what is left at the end
  bool keep_tokens;                    // false: lengths, domains and starts only
};

// Where the tokens went. Names and meanings are those of PackingCounters in packing.py.
struct PackerCounters {
  int64_t tokens_in = 0;
  int64_t instances = 0;
  int64_t tokens = 0;
  int64_t pushed_back_tokens = 0;
  int64_t uncut_instances = 0;
  int64_t dropped_short_tokens = 0;
  int64_t dropped_separator_instances = 0;
  int64_t dropped_separator_tokens = 0;
  int64_t overlong_documents = 0;
  int64_t dropped_overlong_tokens = 0;
  int64_t dropped_tail_tokens = 0;
  int64_t flushed_tails = 0;
  int64_t pending_tokens = 0;
  int64_t documents_without_tokens = 0;
  int64_t separators_in_text = 0;
  int64_t text_bytes_in_tokens = 0;
};

// What one domain put in and got out.
struct DomainCounters {
  int64_t tokens = 0;  // separators included
  int64_t instances = 0;
  int64_t packed_tokens = 0;
  int64_t packed_text_bytes = 0;  // separators stand for none
};

// Documents end to end: document i is ids[offsets[i]] .. ids[offsets[i + 1]].
struct DocumentBatch {
  const int32_t* ids;
  int64_t num_ids;
  const int64_t* offsets;   // num_documents + 1
  const uint16_t* domains;  // num_documents
  int64_t num_documents;
};

// Instances in the order in which they were completed.
struct PackedBatch {
  std::unique_ptr<unsigned char[]> tokens;  // num_tokens of bytes_per_token each; may be null
  int64_t num_tokens = 0;
  std::vector<int32_t> lengths;
  std::vector<uint16_t> domains;
  std::vector<int64_t> starts;  // of an instance in all tokens that its domain was given
};

// Not thread-safe: one call at a time.
class Packer {
 public:
  // Throws std::invalid_argument for options that make no sense.
  explicit Packer(PackerOptions options);

  // Appends documents and returns the instances that they complete. Everything is checked before
  // anything changes: throws std::invalid_argument for offsets that descend or lead outside `ids`
  // and for ids outside the vocabulary.
  PackedBatch Add(const DocumentBatch& batch);

  // Empties the buffers, domains in ascending order; the tails as instances if they are wanted.
  PackedBatch Finish();

  const PackerCounters& counters() const { return counters_; }
  std::vector<DomainCounters> domain_counters() const;
  int64_t bytes_per_token() const { return options_.bytes_per_token; }

 private:
  struct Domain {
    std::vector<int32_t> buffer;  // fewer tokens than a chunk between calls
    int64_t position = 0;         // of the first token that is not cut, among all of the domain
    int64_t text_bytes = 0;       // of all its documents, separators apart
    int64_t dropped_text_bytes = 0;
    DomainCounters counters;
  };

  // A document that is being cut.
  struct Cutting {
    uint16_t number;  // of its domain
    int64_t chunks;   // kept so far
    bool overlong;    // it had more than max_chunks: the rest is dropped
  };

  void Check(const DocumentBatch& batch) const;
  PackedBatch Reserve(int64_t num_tokens) const;
  void AddDocument(const int32_t* ids, int64_t count, uint16_t domain, PackedBatch* out);
  // Cuts chunks off the front of `size` tokens, those that start before `until` and, if `following`
  // tokens of the document come after them, whose next token is here. Returns where it stopped.
  int64_t Cut(Cutting* cutting, const int32_t* data, int64_t size, int64_t until,
              int64_t following, PackedBatch* out);
  int64_t LastCut(const int32_t* data, int64_t start, int64_t end, int64_t size) const;
  // `start` is where the instance lies after the domain's position.
  bool Keep(uint16_t domain, const int32_t* data, int64_t count, int64_t start, PackedBatch* out);
  int64_t TextBytes(const int32_t* data, int64_t count) const;

  PackerOptions options_;
  PackerCounters counters_;
  std::vector<Domain> domains_;
};

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_PACK_H_
