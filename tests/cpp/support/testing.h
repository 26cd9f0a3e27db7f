// doctest where it is installed; where it is not (a GPU machine that can fetch nothing), enough of it to run the
// conformance tests: TEST_CASE, CHECK and REQUIRE with their _EQ … _GE forms, CHECK_THROWS_AS, CAPTURE, INFO, MESSAGE,
// FAIL. Tests that are built for a GPU keep to these. -DEP_MINI_TESTING chooses the second in any case.
#pragma once

namespace deep_ep::testing {

// Runs the test cases of this binary and returns its exit status. Without doctest the one argument that counts is a
// part of the names of the cases to run.
int run_tests(int argc, char** argv);

}  // namespace deep_ep::testing

#if !defined(EP_MINI_TESTING) && __has_include(<doctest/doctest.h>)
#include <doctest/doctest.h>
#else

#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace deep_ep::testing {

struct Case {
    const char* name;
    void (*run)();
};
struct Stop {};  // thrown by a failed REQUIRE

std::vector<Case>& all_cases();
void report_failure(const char* file, int line, const std::string& what);

inline bool add_case(const char* name, void (*run)()) {
    all_cases().push_back({name, run});
    return true;
}

template <class A, class B> std::string show(const char* text, const A& a, const B& b) {
    std::ostringstream out;
    out << text << ": " << a << " against " << b;
    return out.str();
}

}  // namespace deep_ep::testing

#define EP_TEST_JOIN2(a, b) a##b
#define EP_TEST_JOIN(a, b) EP_TEST_JOIN2(a, b)
#define EP_TEST_CASE(id, name)                                                 \
    static void EP_TEST_JOIN(test_case_, id)();                                \
    [[maybe_unused]] static const bool EP_TEST_JOIN(is_test_case_added_, id) = \
        ::deep_ep::testing::add_case(name, &EP_TEST_JOIN(test_case_, id));     \
    static void EP_TEST_JOIN(test_case_, id)()
#define TEST_CASE(name) EP_TEST_CASE(__LINE__, name)
#define EP_TEST_TRUE(is_fatal, ...)                                                            \
    do {                                                                                       \
        if (!(__VA_ARGS__)) {                                                                  \
            ::deep_ep::testing::report_failure(__FILE__, __LINE__, "not true: " #__VA_ARGS__); \
            if (is_fatal) throw ::deep_ep::testing::Stop{};                                    \
        }                                                                                      \
    } while (false)
#define EP_TEST_COMPARE(is_fatal, a, op, b)                                                              \
    do {                                                                                                 \
        const auto& ep_a = (a);                                                                          \
        const auto& ep_b = (b);                                                                          \
        if (!(ep_a op ep_b)) {                                                                           \
            ::deep_ep::testing::report_failure(__FILE__, __LINE__,                                       \
                                               ::deep_ep::testing::show(#a " " #op " " #b, ep_a, ep_b)); \
            if (is_fatal) throw ::deep_ep::testing::Stop{};                                              \
        }                                                                                                \
    } while (false)

#define CHECK(...) EP_TEST_TRUE(false, __VA_ARGS__)
#define CHECK_FALSE(...) EP_TEST_TRUE(false, !(__VA_ARGS__))
#define CHECK_MESSAGE(cond, ...) EP_TEST_TRUE(false, cond)
#define CHECK_EQ(a, b) EP_TEST_COMPARE(false, a, ==, b)
#define CHECK_NE(a, b) EP_TEST_COMPARE(false, a, !=, b)
#define CHECK_LT(a, b) EP_TEST_COMPARE(false, a, <, b)
#define CHECK_LE(a, b) EP_TEST_COMPARE(false, a, <=, b)
#define CHECK_GT(a, b) EP_TEST_COMPARE(false, a, >, b)
#define CHECK_GE(a, b) EP_TEST_COMPARE(false, a, >=, b)
#define REQUIRE(...) EP_TEST_TRUE(true, __VA_ARGS__)
#define REQUIRE_FALSE(...) EP_TEST_TRUE(true, !(__VA_ARGS__))
#define REQUIRE_EQ(a, b) EP_TEST_COMPARE(true, a, ==, b)
#define REQUIRE_NE(a, b) EP_TEST_COMPARE(true, a, !=, b)
#define CHECK_THROWS_AS(expression, ...)                                                                          \
    do {                                                                                                          \
        bool ep_has_thrown = false;                                                                               \
        try {                                                                                                     \
            static_cast<void>(expression);                                                                        \
        } catch (const __VA_ARGS__&) {                                                                            \
            ep_has_thrown = true;                                                                                 \
        }                                                                                                         \
        if (!ep_has_thrown)                                                                                       \
            ::deep_ep::testing::report_failure(__FILE__, __LINE__, "no " #__VA_ARGS__ " thrown by " #expression); \
    } while (false)
#define FAIL(...) EP_TEST_TRUE(true, false && #__VA_ARGS__)
#define CAPTURE(x) static_cast<void>(x)
#define INFO(...) static_cast<void>(0)
#define MESSAGE(...) (::std::cout << __VA_ARGS__ << "\n")

#endif
