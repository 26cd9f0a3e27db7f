// The programs that the mutation test runs. Each is the smallest that needs some of the orderings; together they need all.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deep_ep::test {

struct Scenario {
    const char* name;
    std::string (*run)(uint64_t seed);  // what went wrong, or ""; throws as well
};

// All that are defined with EP_SCENARIO, those of a file in their order.
std::vector<Scenario>& all_scenarios();

struct ScenarioEntry {
    explicit ScenarioEntry(const Scenario& scenario) { all_scenarios().push_back(scenario); }
};

// `EP_SCENARIO(two_warps, seed) { ... }` defines the function two_warps(uint64_t seed) and enters it.
#define EP_SCENARIO(name, seed)                      \
    std::string name(uint64_t seed);                 \
    const ScenarioEntry name##_entry{{#name, name}}; \
    std::string name(uint64_t seed)

}  // namespace deep_ep::test
