// The exceptions of the native code and the checks that throw them. Python sees each as a class of the same name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace deep_ep {

class Error : public std::runtime_error {
    using std::runtime_error::runtime_error;
};
class InvalidArgument : public Error {
    using Error::Error;
};
class CudaError : public Error {
    using Error::Error;
};
class TransportError : public Error {
    using Error::Error;
};
class TimeoutError : public Error {
    using Error::Error;
};

template <class... Parts> std::string concat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace deep_ep

// EP_CHECK(cond, "hidden_bytes must be a multiple of 16, got ", n): throws InvalidArgument.
#define EP_CHECK(cond, ...)                                                            \
    do {                                                                               \
        if (!(cond)) throw ::deep_ep::InvalidArgument(::deep_ep::concat(__VA_ARGS__)); \
    } while (false)

// EP_ENSURE(is_connected, "the heap is not connected"): throws Error, for what no argument of a caller can bring about.
#define EP_ENSURE(cond, ...)                                                                                         \
    do {                                                                                                             \
        if (!(cond)) throw ::deep_ep::Error(::deep_ep::concat("a bug of deep_ep, please report it: ", __VA_ARGS__)); \
    } while (false)
