// Inside the library of the engine `nvshmem`: exceptions end here.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <string>

#include "rail/nvshmem/library.h"

namespace deep_ep::rail::nvshmem {

inline bool complain(Complaint* complaint, const std::string& text) {
    const size_t length = std::min(text.size(), sizeof(complaint->text) - 1);
    std::memcpy(complaint->text, text.data(), length);
    complaint->text[length] = 0;
    return false;
}

// Whether `body` came to its end.
template <class Body> bool guarded(Complaint* complaint, const Body& body) {
    try {
        body();
        return true;
    } catch (const std::exception& error) {
        return complain(complaint, error.what());
    }
}

}  // namespace deep_ep::rail::nvshmem
