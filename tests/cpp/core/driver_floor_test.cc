#include "core/driver_floor.h"

#include <doctest/doctest.h>

namespace deep_ep {
namespace {

TEST_CASE("a driver of the same major version suffices, whatever the minor versions are") {
    CHECK(describe_old_driver({.runtime = 12040, .driver = 12000}).empty());
    CHECK(describe_old_driver({.runtime = 12040, .driver = 13020}).empty());
}

TEST_CASE("a driver that is too old is told with both versions and the floor") {
    const std::string text = describe_old_driver({.runtime = 12040, .driver = 11040});
    CHECK(text.find("runtime of CUDA 12.4") != std::string::npos);
    CHECK(text.find("525.60.13 or newer") != std::string::npos);
    CHECK(text.find("serves CUDA 11.4") != std::string::npos);
    CHECK(describe_old_driver({.runtime = 13000, .driver = 12080}).find("580.65.06") != std::string::npos);
}

TEST_CASE("no driver is told as such") {
    CHECK(describe_old_driver({.runtime = 12040, .driver = 0}).find("this machine has none") != std::string::npos);
}

}  // namespace
}  // namespace deep_ep
