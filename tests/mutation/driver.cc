// Runs the protocols on mutated kernels. Exit status 0: nothing was noticed; 1: something was. Under ThreadSanitizer a
// race ends the process with its own status.
//     driver                        the kernels as they are, every case; says which mutants' places each case reaches
//     driver ID SCENARIO:SEED ...   these cases, with this mutant
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "mutation/mutant.h"
#include "mutation/scenarios.h"

namespace deep_ep::test {

std::vector<Scenario>& all_scenarios() {
    static std::vector<Scenario> all;
    return all;
}

namespace {

constexpr uint64_t kSeeds[] = {0, 1, 2, 3, 6};

std::string outcome(const Scenario& scenario, uint64_t seed) {
    try {
        return scenario.run(seed);
    } catch (const std::exception& error) {
        return error.what();
    }
}

// A line for each case: its time in milliseconds and which mutants' places it reaches.
int run_as_written() {
    for (const Scenario& scenario : all_scenarios())
        for (const uint64_t seed : kSeeds) {
            std::fill(std::begin(mutant::was_reached), std::end(mutant::was_reached), false);
            const auto start = std::chrono::steady_clock::now();
            const std::string found = outcome(scenario, seed);
            const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
            if (!found.empty()) {
                std::printf("%s:%d: %s\n", scenario.name, static_cast<int>(seed), found.c_str());
                return 1;
            }
            std::printf("case %s:%d %d", scenario.name, static_cast<int>(seed), static_cast<int>(took.count()));
            for (int number = 1; number < mutant::kMaxMutants; ++number)
                if (mutant::was_reached[number]) std::printf(" %d", number);
            std::printf("\n");
            std::fflush(stdout);
        }
    return 0;
}

// `which`: a scenario and a seed, as run_as_written prints them.
int run_case(const std::string& which) {
    const size_t colon = which.find(':');
    for (const Scenario& scenario : all_scenarios()) {
        if (which.substr(0, colon) != scenario.name) continue;
        const std::string found = outcome(scenario, std::strtoull(which.c_str() + colon + 1, nullptr, 10));
        if (found.empty()) return 0;
        std::printf("%s: %s\n", which.c_str(), found.c_str());
        return 1;
    }
    std::printf("no scenario %s\n", which.c_str());
    return 2;
}

}  // namespace
}  // namespace deep_ep::test

int main(int argc, char** argv) {
    if (argc < 2) return deep_ep::test::run_as_written();
    deep_ep::mutant::active = std::atoi(argv[1]);
    for (int i = 2; i < argc; ++i)
        if (const int status = deep_ep::test::run_case(argv[i]); status != 0) return status;
    return 0;
}
