// The programs that the mutation test runs. Each is the smallest that needs some of the orderings; together they need all.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace deep_ep::test {

struct Scenario {
    const char* name;
    std::string (*run)(uint64_t seed);  // what went wrong, or ""; throws as well
};

std::span<const Scenario> intranode_scenarios();
std::span<const Scenario> internode_scenarios();
std::span<const Scenario> lending_scenarios();
std::span<const Scenario> low_latency_scenarios();
std::span<const Scenario> low_latency_nodes_scenarios();

}  // namespace deep_ep::test
