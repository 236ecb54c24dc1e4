// Finds one text and one domain in each line of JSON, without building the rest of the record.
//
// A line is *plain* if it is an object, valid in every part, in which the text's key and the
// domain's occur once each with a string; its strings are unescaped to UTF-8 in one pass. Any other
// line (malformed, a key missing, repeated or escaped, an extreme number) is left as it is: the
// caller gives it to a complete parser, which decides and says what is wrong. So whatever is found
// here is what that parser would find.

#ifndef MEGATRON_MINIPLM_CSRC_JSONL_H_
#define MEGATRON_MINIPLM_CSRC_JSONL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace miniplm {

// A string of a record: unescaped, in the arena. Its UTF-8 is not validated unless it is ASCII.
struct Unescaped {
  const char* data = nullptr;
  size_t size = 0;
  bool ascii = true;
};

struct ScannedLine {
  bool plain;
  Unescaped text, domain;  // of a plain line
  const char* begin;       // of the line, in the block
  size_t size;
  int64_t number;  // of the line, from 0, blank ones included
};

struct ScannedBlock {
  std::unique_ptr<char[]> arena;
  std::vector<ScannedLine> lines;  // without the blank ones
  int64_t num_lines = 0;
};

class RecordScanner {
 public:
  // Keys are names of the top object, or paths of names with dots that lead inwards (a name with
  // dots that is really there makes a line unusual). Without `domain_key` there is no domain.
  RecordScanner(std::string text_key, bool has_domain, std::string domain_key);

  // Scans lines that end with '\n', the last one maybe without. Thread-safe.
  ScannedBlock Scan(const char* block, size_t size) const;

 private:
  std::string text_key_, domain_key_;
  std::vector<std::string> text_path_, domain_path_;
  bool has_domain_;
};

}  // namespace miniplm

#endif  // MEGATRON_MINIPLM_CSRC_JSONL_H_
