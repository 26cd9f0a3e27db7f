#if !defined(EP_MINI_TESTING) && __has_include(<doctest/doctest.h>)
#define DOCTEST_CONFIG_IMPLEMENT
#endif
#include "support/testing.h"

#include <exception>

#if !defined(EP_MINI_TESTING) && __has_include(<doctest/doctest.h>)

int deep_ep::testing::run_tests(int argc, char** argv) { return doctest::Context(argc, argv).run(); }

#else

namespace deep_ep::testing {
namespace {

int num_failures = 0;

void run_case(const Case& test) {
    try {
        test.run();
    } catch (const Stop&) {
        // Reported where it was thrown.
    } catch (const std::exception& error) {
        report_failure(test.name, 0, std::string("exception: ") + error.what());
    }
}

}  // namespace

std::vector<Case>& all_cases() {
    static std::vector<Case> cases;
    return cases;
}

void report_failure(const char* file, int line, const std::string& what) {
    ++num_failures;
    std::cout << file << ":" << line << ": " << what << std::endl;
}

int run_tests(int argc, char** argv) {
    int num_failed = 0;
    int num_run = 0;
    for (const Case& test : all_cases()) {
        if (argc > 1 && std::string(test.name).find(argv[1]) == std::string::npos) continue;
        const int before = num_failures;
        run_case(test);
        ++num_run;
        num_failed += num_failures > before;
        std::cout << (num_failures > before ? "FAILED " : "passed ") << test.name << std::endl;
    }
    std::cout << num_run - num_failed << " of " << num_run << " test cases passed" << std::endl;
    return num_failed == 0 && num_run > 0 ? 0 : 1;
}

}  // namespace deep_ep::testing

#endif
