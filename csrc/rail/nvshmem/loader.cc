#include "rail/nvshmem/loader.h"

#include <dlfcn.h>

#include <cstdio>
#include <mutex>
#include <optional>

#include "core/error.h"
#include "rail/nvshmem/versions.h"

namespace deep_ep::rail::nvshmem {
namespace {

constexpr const char* kHostLibrary = "libnvshmem_host.so.3";  // the name of all of major version 3
constexpr const char* kEnginePrefix = "libdeep_ep_nvshmem-";
constexpr const char* kRemedy = "`python -m deep_ep build-nvshmem`";

std::mutex mutex;
World* world = nullptr;  // for the life of the process, like NVSHMEM's own

std::string last_error() {
    const char* text = dlerror();
    return text == nullptr ? "unknown" : text;
}

// What is in the process already serves: torch loads one, and two of a name are not kept apart.
void* open_host_library(const std::string& path) {
    if (void* found = dlopen(kHostLibrary, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD); found != nullptr) return found;
    const std::string name = path.empty() ? kHostLibrary : path;
    void* opened = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (opened == nullptr)
        throw TransportError(concat("NVSHMEM does not load: ", last_error(),
                                    ". Install nvidia-nvshmem-cu13 (or -cu12), or set NVSHMEM_DIR to where it is"));
    return opened;
}

Version version_of(void* host_library) {
    using GetVersion = void (*)(int*, int*, int*);
    const auto get = reinterpret_cast<GetVersion>(dlsym(host_library, "nvshmemx_vendor_get_version_info"));
    if (get == nullptr)
        throw TransportError("NVSHMEM is too old: it does not tell its version. 3.4.5 is the oldest that is tried");
    Version version{};
    get(&version.major, &version.minor, &version.patch);
    return version;
}

std::optional<Version> built_version(const std::string& file) {
    const size_t start = file.rfind(kEnginePrefix);
    Version version{};
    if (start == std::string::npos) return std::nullopt;
    const char* text = file.c_str() + start + std::string(kEnginePrefix).size();
    if (std::sscanf(text, "%d.%d.%d-", &version.major, &version.minor, &version.patch) != 3) return std::nullopt;
    return version;
}

std::string choose_engine(const std::vector<std::string>& engines, const Version& loaded) {
    std::string reasons;
    for (const std::string& file : engines) {
        const std::optional<Version> built = built_version(file);
        const std::string reason = built ? why_unfit(*built, loaded) : "its name says no version";
        if (reason.empty()) return file;
        reasons += concat("; ", file, ": ", reason);
    }
    throw TransportError(concat("no library of the engine nvshmem fits NVSHMEM ", text(loaded),
                                " here: build one with ", kRemedy, reasons));
}

const Library& open_engine(const std::string& file) {
    void* opened = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr)
        throw TransportError(concat(file, " does not load: ", last_error(), ". Build it again with ", kRemedy));
    const auto get = reinterpret_cast<GetLibrary>(dlsym(opened, kLibrarySymbol));
    if (get == nullptr) throw TransportError(concat(file, " is no library of the engine nvshmem"));
    return *get();
}

}  // namespace

World& load_world(const std::string& host_library, const std::vector<std::string>& engines, Transport transport) {
    const std::lock_guard lock(mutex);
    if (world == nullptr) {
        const Version loaded = version_of(open_host_library(host_library));
        world = new World(open_engine(choose_engine(engines, loaded)), loaded, transport);
    }
    return *world;
}

World& loaded_world() {
    const std::lock_guard lock(mutex);
    if (world == nullptr) throw TransportError("NVSHMEM is not loaded in this process");
    return *world;
}

}  // namespace deep_ep::rail::nvshmem
