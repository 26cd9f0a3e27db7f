#include "core/error.h"

#include <doctest/doctest.h>

#include <string>
#include <type_traits>

namespace deep_ep {

namespace {

void check(int got) { EP_CHECK(got == 3, "num_ranks must be 3, got ", got); }
void ensure(int got) { EP_ENSURE(got == 3, "num_ranks must be 3, got ", got); }

template <class Thrown, class Call> std::string sentence_of(const Call& call) {
    try {
        call();
    } catch (const Thrown& error) {
        return error.what();
    }
    return "nothing was thrown";
}

}  // namespace

TEST_CASE("a bad argument and a bug of ours are told apart") {
    CHECK_EQ(sentence_of<InvalidArgument>([] { check(4); }), "num_ranks must be 3, got 4");
    CHECK_EQ(sentence_of<InternalError>([] { ensure(4); }),
             "a bug of deep_ep, please report it: num_ranks must be 3, got 4");
    CHECK(!std::is_base_of_v<InvalidArgument, InternalError>);
    CHECK(std::is_base_of_v<Error, InternalError>);
}

TEST_CASE("what holds throws nothing") {
    check(3);
    ensure(3);
}

}  // namespace deep_ep
