#include "core/error.h"
#include "core/text.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <string_view>
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

TEST_CASE("a text that is cut ends with a whole letter") {
    CHECK_EQ(whole_letters("abc", 3), "abc");
    CHECK_EQ(whole_letters("abc", 2), "ab");
    const std::string text = "r\u00fcck \u4e2d\u6587";  // letters of two and of three bytes
    for (size_t most = 0; most <= text.size() + 1; ++most) {
        CAPTURE(most);
        const std::string_view cut = whole_letters(text, most);
        CHECK_LE(cut.size(), most);
        CHECK_GE(cut.size() + 3, std::min(most, text.size()) + 1);
        CHECK((cut.size() == text.size() || (static_cast<unsigned char>(text[cut.size()]) & 0xc0) != 0x80));
    }
}

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
