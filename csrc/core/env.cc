#include "core/env.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "core/error.h"

namespace deep_ep {
namespace {

class Reader {
public:
    explicit Reader(const std::function<std::optional<std::string>(const char*)>& find) : find_(find) {}

    double seconds(const char* name, double fallback) const {
        const std::string text = value(name);
        if (text.empty()) return fallback;
        double number = 0;
        EP_CHECK(parse(text, number) && std::isfinite(number) && number > 0, name,
                 ": expected a positive number of seconds, got '", text, "'");
        return number;
    }

    // 0 is what every count means when it is not set.
    int count(const char* name, int maximum, const char* meaning) const {
        const std::string text = value(name);
        if (text.empty()) return 0;
        int number = 0;
        EP_CHECK(parse(text, number) && number >= 0 && number <= maximum, name, ": expected ", meaning, ", 0 to ",
                 maximum, " (0: automatic), got '", text, "'");
        return number;
    }

    bool flag(const char* name) const {
        const std::string text = value(name);
        EP_CHECK(text.empty() || text == "0" || text == "1", name, ": expected 0, 1 or nothing (0), got '", text, "'");
        return text == "1";
    }

    int64_t bytes(const char* name, int64_t multiple_of, int64_t fallback) const {
        const std::string text = value(name);
        if (text.empty()) return fallback;
        int64_t number = 0;
        EP_CHECK(parse(text, number) && number >= 0 && number % multiple_of == 0, name,
                 ": expected a number of bytes, a multiple of ", multiple_of, ", got '", text, "'");
        return number;
    }

    std::string text(const char* name) const { return value(name); }
    std::string text(const char* name, const std::string& fallback) const {
        const std::string given = value(name);
        return given.empty() ? fallback : given;
    }

    std::string choice(const char* name, std::string_view one, std::string_view other) const {
        const std::string text = value(name);
        EP_CHECK(text.empty() || text == one || text == other, name, ": expected '", one, "', '", other,
                 "' or nothing (automatic), got '", text, "'");
        return text;
    }

private:
    // Not set, empty and blank are the same: nothing.
    std::string value(const char* name) const {
        const std::string text = find_(name).value_or("");
        const auto first = text.find_first_not_of(" \t");
        if (first == std::string::npos) return "";
        return text.substr(first, text.find_last_not_of(" \t") - first + 1);
    }

    template <class T> static bool parse(std::string_view text, T& number) {
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
        return error == std::errc() && end == text.data() + text.size();
    }

    const std::function<std::optional<std::string>(const char*)>& find_;
};

std::optional<std::string> find_in_process(const char* name) {
    const char* text = std::getenv(name);
    return text == nullptr ? std::nullopt : std::optional<std::string>(text);
}

}  // namespace

Environment parse_environment(const std::function<std::optional<std::string>(const char* name)>& find) {
    const Reader read(find);
    Environment env;
    env.timeout_s = read.seconds("DEEP_EP_TIMEOUT_SECS", env.timeout_s);
    env.warn_s = read.seconds("DEEP_EP_WARN_SECS", env.warn_s);
    env.ranks_per_node = read.count("DEEP_EP_RANKS_PER_NODE", 1 << 20, "the number of ranks in a node");
    env.device = read.choice("DEEP_EP_DEVICE", "cpu", "cuda");
    env.cost_model = read.text("DEEP_EP_COST_MODEL");
    env.num_sms = read.count("DEEP_EP_NUM_SMS", 1024, "a number of SMs");
    env.lend_bytes = read.bytes("DEEP_EP_LEND_BYTES", 128, env.lend_bytes);
    env.check_calls = read.flag("DEEP_EP_CHECK_CALLS");
    env.cpu_sms = read.count("DEEP_EP_CPU_SMS", 1024, "a number of simulated SMs");
    env.heap = read.choice("DEEP_EP_HEAP", "device", "host");
    env.rail = read.text("DEEP_EP_RAIL");
    env.rail_interface = read.text("DEEP_EP_RAIL_INTERFACE");
    return env;
}

const Environment& environment() {
    static const Environment env = parse_environment(find_in_process);
    return env;
}

}  // namespace deep_ep
