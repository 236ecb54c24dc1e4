#include "pack.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace miniplm {
namespace {

[[noreturn]] void RefuseIds(const DocumentBatch& batch, size_t vocabulary) {
  const auto [lowest, highest] = std::minmax_element(batch.ids, batch.ids + batch.num_ids);
  throw std::invalid_argument("token ids from " + std::to_string(*lowest) + " to " +
                              std::to_string(*highest) + ", but the vocabulary has " +
                              std::to_string(vocabulary) +
                              " tokens: pack with the tokenizer that encoded them");
}

template <typename T>
void Narrow(const int32_t* from, int64_t count, unsigned char* to) {
  // The destination is memory of ours, aligned by `new` and advanced by whole tokens.
  T* typed = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) typed[i] = static_cast<T>(from[i]);
}

}  // namespace

Packer::Packer(PackerOptions options) : options_(std::move(options)) {
  const int64_t vocabulary = static_cast<int64_t>(options_.flags.size());
  const bool narrow = options_.bytes_per_token == 2;
  if (options_.flags.size() != options_.byte_lengths.size()) {
    throw std::invalid_argument("flags for " + std::to_string(vocabulary) + " tokens, but " +
                                std::to_string(options_.byte_lengths.size()) + " byte lengths");
  }
  if (options_.eod_id < 0 || options_.eod_id >= vocabulary) {
    throw std::invalid_argument("the separator " + std::to_string(options_.eod_id) +
                                " is not among " + std::to_string(vocabulary) + " tokens");
  }
  if (!narrow && options_.bytes_per_token != 4) {
    throw std::invalid_argument("tokens of " + std::to_string(options_.bytes_per_token) +
                                " bytes: must be 2 or 4");
  }
  if (narrow && vocabulary > std::numeric_limits<uint16_t>::max() + int64_t{1}) {
    throw std::invalid_argument("a vocabulary of " + std::to_string(vocabulary) +
                                " does not fit tokens of 2 bytes");
  }
  if (options_.seq_length < 1 || options_.seq_length >= std::numeric_limits<int32_t>::max() ||
      options_.max_chunks < 1) {
    throw std::invalid_argument("sequence length " + std::to_string(options_.seq_length) +
                                " or chunks a document " + std::to_string(options_.max_chunks) +
                                " out of range");
  }
}

PackedBatch Packer::Add(const DocumentBatch& batch) {
  Check(batch);
  PackedBatch out = Reserve(counters_.pending_tokens + batch.num_ids + batch.num_documents);
  for (int64_t i = 0; i < batch.num_documents; ++i) {
    const int64_t count = batch.offsets[i + 1] - batch.offsets[i];
    if (count == 0) {
      ++counters_.documents_without_tokens;
    } else {
      AddDocument(batch.ids + batch.offsets[i], count, batch.domains[i], &out);
    }
  }
  return out;
}

PackedBatch Packer::Finish() {
  PackedBatch out = Reserve(options_.flush_tails ? counters_.pending_tokens : 0);
  for (size_t number = 0; number < domains_.size(); ++number) {
    Domain& domain = domains_[number];
    const int32_t* data = domain.buffer.data();
    const int64_t size = static_cast<int64_t>(domain.buffer.size());
    counters_.pending_tokens -= size;
    if (!options_.flush_tails) {
      counters_.dropped_tail_tokens += size;
      domain.dropped_text_bytes += TextBytes(data, size);
    } else if (size == 1) {
      ++counters_.dropped_short_tokens;
      domain.dropped_text_bytes += TextBytes(data, size);
    } else if (size > 1) {
      counters_.flushed_tails += Keep(static_cast<uint16_t>(number), data, size, 0, &out);
    }
    domain.position += size;
    std::vector<int32_t>().swap(domain.buffer);
  }
  return out;
}

std::vector<DomainCounters> Packer::domain_counters() const {
  std::vector<DomainCounters> counters;
  for (const Domain& domain : domains_) {
    counters.push_back(domain.counters);
    const int64_t pending =
        TextBytes(domain.buffer.data(), static_cast<int64_t>(domain.buffer.size()));
    counters.back().packed_text_bytes = domain.text_bytes - domain.dropped_text_bytes - pending;
  }
  return counters;
}

void Packer::Check(const DocumentBatch& batch) const {
  for (int64_t i = 0; i < batch.num_documents; ++i) {
    if (batch.offsets[i] < 0 || batch.offsets[i] > batch.offsets[i + 1]) {
      throw std::invalid_argument("document " + std::to_string(i) + " is from " +
                                  std::to_string(batch.offsets[i]) + " to " +
                                  std::to_string(batch.offsets[i + 1]) +
                                  ": offsets must ascend from 0");
    }
  }
  if (batch.num_documents > 0 && batch.offsets[batch.num_documents] > batch.num_ids) {
    throw std::invalid_argument("offsets up to " +
                                std::to_string(batch.offsets[batch.num_documents]) + ", but " +
                                std::to_string(batch.num_ids) + " ids");
  }
  // Seen as unsigned, a negative id is above every vocabulary too.
  uint32_t highest = 0;
  for (int64_t i = 0; i < batch.num_ids; ++i) {
    highest = std::max(highest, static_cast<uint32_t>(batch.ids[i]));
  }
  if (batch.num_ids > 0 && highest >= options_.flags.size()) {
    RefuseIds(batch, options_.flags.size());
  }
}

PackedBatch Packer::Reserve(int64_t num_tokens) const {
  PackedBatch out;
  if (options_.keep_tokens) {
    // Not initialised: it is an upper bound, and what is used of it is written first.
    out.tokens.reset(new unsigned char[static_cast<size_t>(num_tokens * options_.bytes_per_token)]);
  }
  return out;
}

void Packer::AddDocument(const int32_t* ids, int64_t count, uint16_t number, PackedBatch* out) {
  if (number >= domains_.size()) domains_.resize(number + size_t{1});
  Domain& domain = domains_[number];
  int64_t text_bytes = 0;
  int64_t separators = 0;
  for (int64_t i = 0; i < count; ++i) {
    text_bytes += options_.byte_lengths[static_cast<size_t>(ids[i])];
    separators += ids[i] == options_.eod_id;
  }
  counters_.text_bytes_in_tokens += text_bytes;
  counters_.separators_in_text += separators;
  const int64_t eod_bytes = options_.byte_lengths[static_cast<size_t>(options_.eod_id)];
  domain.text_bytes += text_bytes - separators * eod_bytes;
  const int64_t tokens = count + options_.append_eod;
  domain.counters.tokens += tokens;
  counters_.tokens_in += tokens;

  std::vector<int32_t>& buffer = domain.buffer;
  const int64_t held = static_cast<int64_t>(buffer.size());
  const int64_t beyond = domain.position + held + tokens;  // of the document's last token
  const int64_t enough = options_.seq_length + 2;          // a chunk and the token after it
  Cutting cutting = {number, 0, false};
  int64_t done = 0;  // of ids
  if (held > 0 && count > enough) {
    // Chunks that start in the buffer; those after them are cut where the ids lie.
    buffer.insert(buffer.end(), ids, ids + enough);
    const int64_t used = Cut(&cutting, buffer.data(), held + enough, held, tokens - enough, out);
    if (cutting.overlong) domain.dropped_text_bytes += TextBytes(ids + enough, count - enough);
    domain.position += used;
    done = used - held;
    buffer.clear();
  }
  if (buffer.empty() && !cutting.overlong) {
    const int64_t rest = count - done;
    const int64_t used = Cut(&cutting, ids + done, rest, rest, options_.append_eod, out);
    domain.position += used;
    done += used;
  }
  if (!cutting.overlong) {
    buffer.insert(buffer.end(), ids + done, ids + count);
    if (options_.append_eod) buffer.push_back(options_.eod_id);
    const int64_t size = static_cast<int64_t>(buffer.size());
    const int64_t used = Cut(&cutting, buffer.data(), size, size, 0, out);
    domain.position += used;
    buffer.erase(buffer.begin(), buffer.begin() + used);
  }
  if (cutting.overlong) {
    buffer.clear();
    domain.position = beyond;
  }
  counters_.pending_tokens += static_cast<int64_t>(buffer.size()) - held;
}

int64_t Packer::Cut(Cutting* cutting, const int32_t* data, int64_t size, int64_t until,
                    int64_t following, PackedBatch* out) {
  const int64_t longest = options_.seq_length + 1;
  const int64_t needed = longest + (following > 0 ? 1 : 0);
  Domain& domain = domains_[cutting->number];
  int64_t start = 0;
  while (start < until && size - start >= needed) {
    int64_t end = start + longest;
    const int64_t cut = LastCut(data, start, end, size);
    if (cut < start) {
      ++counters_.uncut_instances;
    } else {
      counters_.pushed_back_tokens += end - (cut + 1);
      end = cut + 1;
    }
    if (end - start == 1) {
      ++counters_.dropped_short_tokens;
      domain.dropped_text_bytes += TextBytes(data + start, 1);
    } else if (cutting->chunks == options_.max_chunks) {
      cutting->overlong = true;
      ++counters_.overlong_documents;
      counters_.dropped_overlong_tokens += size - start + following;
      domain.dropped_text_bytes += TextBytes(data + start, size - start);
      return start;
    } else {
      ++cutting->chunks;
      Keep(cutting->number, data + start, end - start, start, out);
    }
    start = end;
  }
  return start;
}

// The last cut in [start, end) of `size` tokens, or start - 1.
int64_t Packer::LastCut(const int32_t* data, int64_t start, int64_t end, int64_t size) const {
  const uint8_t* flags = options_.flags.data();
  // Past the last token the answer is "a space": a sentence may end there.
  uint8_t next = end < size ? flags[data[end]] : kHasSpace;
  for (int64_t at = end - 1; at >= start; --at) {
    const uint8_t here = flags[data[at]];
    if ((here & kCutAlways) || ((here & kCutIfSpace) && ((here | next) & kHasSpace))) return at;
    next = here;
  }
  return start - 1;
}

// Appends an instance to the output, unless its inputs are all separators: it would train nothing.
// Returns whether it was kept.
bool Packer::Keep(uint16_t number, const int32_t* data, int64_t count, int64_t start,
                  PackedBatch* out) {
  Domain& domain = domains_[number];
  const auto is_separator = [this](int32_t id) { return id == options_.eod_id; };
  if (std::all_of(data, data + count - 1, is_separator)) {
    ++counters_.dropped_separator_instances;
    counters_.dropped_separator_tokens += count;
    domain.dropped_text_bytes += TextBytes(data, count);
    return false;
  }
  out->lengths.push_back(static_cast<int32_t>(count));
  out->domains.push_back(number);
  out->starts.push_back(domain.position + start);
  if (options_.keep_tokens) {
    unsigned char* to = out->tokens.get() + out->num_tokens * options_.bytes_per_token;
    if (options_.bytes_per_token == 2) {
      Narrow<uint16_t>(data, count, to);
    } else {
      Narrow<int32_t>(data, count, to);
    }
    out->num_tokens += count;
  }
  ++counters_.instances;
  counters_.tokens += count;
  ++domain.counters.instances;
  domain.counters.packed_tokens += count;
  return true;
}

// Bytes of text that tokens stand for; a separator stands for none.
int64_t Packer::TextBytes(const int32_t* data, int64_t count) const {
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    bytes += data[i] == options_.eod_id ? 0 : options_.byte_lengths[static_cast<size_t>(data[i])];
  }
  return bytes;
}

}  // namespace miniplm
