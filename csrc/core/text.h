// Text of bounded size.
#pragma once

#include <string_view>

namespace deep_ep {

// As much of a UTF-8 text as fits into `most` bytes without a part of a letter, which Python would refuse to read.
inline std::string_view whole_letters(std::string_view text, size_t most) {
    if (text.size() <= most) return text;
    size_t size = most;
    while (size > 0 && (static_cast<unsigned char>(text[size]) & 0xc0) == 0x80) --size;
    return text.substr(0, size);
}

}  // namespace deep_ep
