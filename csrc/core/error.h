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

// Something that only a mistake in this library can bring about, whatever its caller and the machine do.
class InternalError : public Error {
public:
    explicit InternalError(const std::string& what) : Error("a bug of deep_ep, please report it: " + what) {}
};

template <class... Parts> std::string concat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace deep_ep

// Of what the user passed, or of the machine that it is used on.
// EP_CHECK(cond, "hidden_bytes must be a multiple of 16, got ", n): throws InvalidArgument.
#define EP_CHECK(cond, ...)                                                            \
    do {                                                                               \
        if (!(cond)) throw ::deep_ep::InvalidArgument(::deep_ep::concat(__VA_ARGS__)); \
    } while (false)

// An assertion, of our own code.
// EP_ENSURE(is_connected, "the heap is not connected"): throws InternalError. Not in a destructor: it would end the process.
#define EP_ENSURE(cond, ...)                                                         \
    do {                                                                             \
        if (!(cond)) throw ::deep_ep::InternalError(::deep_ep::concat(__VA_ARGS__)); \
    } while (false)
