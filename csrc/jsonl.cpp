#include "jsonl.h"

#include <cstring>
#include <string_view>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace miniplm {
namespace {

constexpr int kDeepest = 64;        // of nested values; deeper ones are left to the caller
constexpr int kLongestInteger = 18;  // digits that fit 64 bits

bool IsSpace(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

std::vector<std::string> SplitPath(const std::string& key) {
  std::vector<std::string> path(1);
  for (const char c : key) {
    if (c == '.') {
      path.emplace_back();
    } else {
      path.back() += c;
    }
  }
  return path;
}

// Whether the bytes are well-formed UTF-8 (no overlong forms, no surrogates, at most U+10FFFF).
bool IsUtf8(const char* next, const char* end) {
  const auto continues = [&](int at, unsigned low, unsigned high) {
    const unsigned byte = static_cast<unsigned char>(next[at]);
    return byte >= low && byte <= high;
  };
  while (next < end) {
    const unsigned lead = static_cast<unsigned char>(*next);
    const auto left = end - next;
    if (lead < 0x80) {
      next += 1;
    } else if (lead >= 0xC2 && lead < 0xE0 && left >= 2 && continues(1, 0x80, 0xBF)) {
      next += 2;
    } else if (lead >= 0xE0 && lead < 0xF0 && left >= 3 &&
               continues(1, lead == 0xE0 ? 0xA0 : 0x80, lead == 0xED ? 0x9F : 0xBF) &&
               continues(2, 0x80, 0xBF)) {
      next += 3;
    } else if (lead >= 0xF0 && lead < 0xF5 && left >= 4 &&
               continues(1, lead == 0xF0 ? 0x90 : 0x80, lead == 0xF4 ? 0x8F : 0xBF) &&
               continues(2, 0x80, 0xBF) && continues(3, 0x80, 0xBF)) {
      next += 4;
    } else {
      return false;
    }
  }
  return true;
}

// One line, read from the front; every method says false where the line is not plain.
class LineParser {
 public:
  LineParser(const char* begin, const char* end, char* arena)
      : next_(begin), end_(end), out_(arena) {}

  struct Wanted {
    const std::string* whole;  // the key as it is given
    const std::vector<std::string>* path;
    Unescaped* found;
  };

  // The whole line as one object with all of `wanted` in it.
  bool Line(const std::vector<Wanted>& wanted) {
    Spaces();
    if (!Object(wanted, 0)) return false;
    Spaces();
    for (const Wanted& one : wanted) {
      if (one.found->data == nullptr) return false;
    }
    return next_ == end_;
  }

  char* arena() const { return out_; }

 private:
  bool Take(char c) {
    if (next_ == end_ || *next_ != c) return false;
    ++next_;
    return true;
  }

  void Spaces() {
    while (next_ < end_ && IsSpace(*next_)) ++next_;
  }

  // An object; at `depth` the path elements before it have been followed.
  bool Object(const std::vector<Wanted>& wanted, size_t depth) {
    if (!Take('{')) return false;
    Spaces();
    if (Take('}')) return true;
    do {
      Spaces();
      std::string_view key;
      if (!Key(&key)) return false;
      Spaces();
      if (!Take(':')) return false;
      Spaces();
      if (!Member(key, wanted, depth)) return false;
      Spaces();
    } while (Take(','));
    return Take('}');
  }

  bool Member(std::string_view key, const std::vector<Wanted>& wanted, size_t depth) {
    std::vector<Wanted> inside;
    for (const Wanted& one : wanted) {
      if (depth == 0 && one.path->size() > 1 && key == *one.whole) return false;
      if (key != (*one.path)[depth]) continue;
      if (one.path->size() > depth + 1) {
        inside.push_back(one);
      } else {
        return one.found->data == nullptr && Text(one.found);
      }
    }
    if (inside.empty()) return Value(0);
    for (const Wanted& one : inside) {
      if (one.found->data != nullptr) return false;
    }
    return Object(inside, depth + 1);
  }

  // Any value, validated and passed over.
  bool Value(int depth) {
    if (next_ == end_ || depth > kDeepest) return false;
    switch (*next_) {
      case '"':
        return Skipped();
      case '{':
      case '[':
        return Nested(depth);
      case 't':
        return Word("true");
      case 'f':
        return Word("false");
      case 'n':
        return Word("null");
      default:
        return Number();
    }
  }

  bool Nested(int depth) {
    const bool object = *next_ == '{';
    const char closing = object ? '}' : ']';
    ++next_;
    Spaces();
    if (Take(closing)) return true;
    do {
      Spaces();
      if (object) {
        if (next_ == end_ || *next_ != '"' || !Skipped()) return false;
        Spaces();
        if (!Take(':')) return false;
        Spaces();
      }
      if (!Value(depth + 1)) return false;
      Spaces();
    } while (Take(','));
    return Take(closing);
  }

  bool Word(std::string_view word) {
    if (static_cast<size_t>(end_ - next_) < word.size() ||
        std::string_view(next_, word.size()) != word) {
      return false;
    }
    next_ += word.size();
    return true;
  }

  // A number without an exponent whose integer part fits 64 bits.
  bool Number() {
    Take('-');
    const char* first = next_;
    while (next_ < end_ && IsDigit(*next_)) ++next_;
    const auto digits = next_ - first;
    if (digits < 1 || digits > kLongestInteger || (digits > 1 && *first == '0')) return false;
    if (Take('.')) {
      const char* fraction = next_;
      while (next_ < end_ && IsDigit(*next_)) ++next_;
      if (next_ == fraction) return false;
    }
    return next_ == end_ || (*next_ != 'e' && *next_ != 'E');
  }

  // A key without escapes, where it lies.
  bool Key(std::string_view* key) {
    if (!Take('"')) return false;
    const char* begin = next_;
    bool ascii = true;
    while (next_ < end_ && *next_ != '"') {
      const unsigned char c = static_cast<unsigned char>(*next_);
      if (c < 0x20 || c == '\\') return false;
      ascii &= c < 0x80;
      ++next_;
    }
    *key = std::string_view(begin, static_cast<size_t>(next_ - begin));
    return Take('"') && (ascii || IsUtf8(begin, begin + key->size()));
  }

  // A string that is not wanted: unescaped where the next one will overwrite it.
  bool Skipped() {
    char* const before = out_;
    Unescaped ignored;
    const bool good = Text(&ignored);
    out_ = before;
    return good && (ignored.ascii || IsUtf8(ignored.data, ignored.data + ignored.size));
  }

  // A string, unescaped to the arena.
  bool Text(Unescaped* text) {
    if (!Take('"')) return false;
    text->data = out_;
    text->ascii = true;
    while (true) {
      Run(text);
      if (next_ == end_) return false;
      const unsigned char c = static_cast<unsigned char>(*next_);
      if (c == '"') {
        ++next_;
        text->size = static_cast<size_t>(out_ - text->data);
        return true;
      }
      if (c != '\\') return false;  // a control character
      ++next_;
      if (!Escape(text)) return false;
    }
  }

  // Copies up to the next quote, backslash or control character.
  void Run(Unescaped* text) {
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"'), backslash = _mm_set1_epi8('\\');
    const __m128i control = _mm_set1_epi8(0x1F);
    while (end_ - next_ >= 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(next_));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out_), bytes);
      const __m128i special = _mm_or_si128(
          _mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, backslash)),
          _mm_cmpeq_epi8(_mm_min_epu8(bytes, control), bytes));
      const unsigned high = static_cast<unsigned>(_mm_movemask_epi8(bytes));
      const unsigned stops = static_cast<unsigned>(_mm_movemask_epi8(special));
      if (stops == 0) {
        text->ascii &= high == 0;
        next_ += 16;
        out_ += 16;
        continue;
      }
      const int count = __builtin_ctz(stops);
      text->ascii &= (high & ((1u << count) - 1)) == 0;
      next_ += count;
      out_ += count;
      return;
    }
#endif
    while (next_ < end_) {
      const unsigned char c = static_cast<unsigned char>(*next_);
      if (c == '"' || c == '\\' || c < 0x20) return;
      text->ascii &= c < 0x80;
      *out_++ = *next_++;
    }
  }

  bool Escape(Unescaped* text) {
    if (next_ == end_) return false;
    const char c = *next_++;
    switch (c) {
      case '"':
      case '\\':
      case '/':
        *out_++ = c;
        return true;
      case 'b':
        *out_++ = '\b';
        return true;
      case 'f':
        *out_++ = '\f';
        return true;
      case 'n':
        *out_++ = '\n';
        return true;
      case 'r':
        *out_++ = '\r';
        return true;
      case 't':
        *out_++ = '\t';
        return true;
      case 'u':
        return CodePoint(text);
      default:
        return false;
    }
  }

  // The four digits after \u, and the second half of a surrogate pair.
  bool CodePoint(Unescaped* text) {
    uint32_t point;
    if (!Hex(&point)) return false;
    if (point >= 0xDC00 && point < 0xE000) return false;
    if (point >= 0xD800 && point < 0xDC00) {
      uint32_t low;
      if (!Take('\\') || !Take('u') || !Hex(&low) || low < 0xDC00 || low > 0xDFFF) return false;
      point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    }
    // At most as many bytes as the escape had.
    const auto put = [this](uint32_t byte) { *out_++ = static_cast<char>(byte); };
    if (point < 0x80) {
      put(point);
      return true;
    }
    text->ascii = false;
    if (point < 0x800) {
      put(0xC0 | point >> 6);
    } else {
      if (point < 0x10000) {
        put(0xE0 | point >> 12);
      } else {
        put(0xF0 | point >> 18);
        put(0x80 | (point >> 12 & 0x3F));
      }
      put(0x80 | (point >> 6 & 0x3F));
    }
    put(0x80 | (point & 0x3F));
    return true;
  }

  bool Hex(uint32_t* value) {
    if (end_ - next_ < 4) return false;
    *value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = *next_++;
      const char lower = static_cast<char>(c | 0x20);
      if (!IsDigit(c) && (lower < 'a' || lower > 'f')) return false;
      *value = *value << 4 | static_cast<uint32_t>(IsDigit(c) ? c - '0' : lower - 'a' + 10);
    }
    return true;
  }

  const char* next_;
  const char* const end_;
  char* out_;
};

// As Python's bytes.isspace: also of nothing.
bool IsBlank(const char* next, const char* end) {
  while (next < end && (IsSpace(*next) || *next == '\v' || *next == '\f')) ++next;
  return next == end;
}

}  // namespace

RecordScanner::RecordScanner(std::string text_key, bool has_domain, std::string domain_key)
    : text_key_(std::move(text_key)),
      domain_key_(std::move(domain_key)),
      text_path_(SplitPath(text_key_)),
      domain_path_(SplitPath(domain_key_)),
      has_domain_(has_domain) {}

ScannedBlock RecordScanner::Scan(const char* block, size_t size) const {
  ScannedBlock out;
  // Unescaped strings are never longer than their lines; whole vectors are stored at the end.
  out.arena.reset(new char[size + 16]);
  char* arena = out.arena.get();
  const char* next = block;
  const char* const last = block + size;
  while (next < last) {
    const void* newline = std::memchr(next, '\n', static_cast<size_t>(last - next));
    const char* end = newline != nullptr ? static_cast<const char*>(newline) : last;
    if (!IsBlank(next, end)) {
      ScannedLine line = {};
      line.begin = next;
      line.size = static_cast<size_t>(end - next);
      line.number = out.num_lines;
      std::vector<LineParser::Wanted> wanted = {{&text_key_, &text_path_, &line.text}};
      if (has_domain_) wanted.push_back({&domain_key_, &domain_path_, &line.domain});
      LineParser parser(next, end, arena);
      line.plain = parser.Line(wanted);
      if (line.plain) arena = parser.arena();
      out.lines.push_back(line);
    }
    ++out.num_lines;
    next = end + 1;
  }
  return out;
}

}  // namespace miniplm
