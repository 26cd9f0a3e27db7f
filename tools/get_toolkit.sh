#!/usr/bin/env bash
# Brings a toolkit that is not installed here into a folder, from the package registries, and prints that folder.
#   get_toolkit.sh cuda-12.4   nvcc 12.4 with the static runtime: what the wheel is compiled with
#   get_toolkit.sh cuda-11.8   nvcc 11.8, the oldest that is compiled with
#   get_toolkit.sh aarch64     the libraries that the extension is linked with on Arm hosts, for the installed nvcc
#   get_toolkit.sh nvshmem-3.4.5   NVSHMEM for CUDA 13, of that version of the PyPI package
# The folder is kept in ${XDG_CACHE_HOME:-~/.cache}/deep_ep/toolkits; the system's packages and sources stay as they are.
set -euo pipefail
python=${PYTHON:-python3}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/deep_ep/toolkits

say() { echo "[get_toolkit] $*" >&2; }
fail() {
    say "$*"
    exit 1
}

# Debian packages of a newer release, unpacked only. The mirror is the one that this machine already uses.
fetch_debian() { # work folder, suite, component, architecture, package=version...
    local work=$1 suite=$2 component=$3 arch=$4 mirror
    shift 4
    command -v apt-get >/dev/null || fail 'needs apt-get (a Debian system)'
    # shellcheck disable=SC2016  # the parentheses are apt's
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' 'Created-By: Packages' |
        awk '$2 == "main" && $1 ~ /\/debian\/?$/ { print $1; exit }')
    [[ -n $mirror ]] || fail 'no Debian mirror among the sources of apt'
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs"
    echo "deb [arch=$arch] $mirror $suite $component" >"$work/sources.list"
    cat >"$work/apt.conf" <<CONF
Dir::State::Lists "$work/lists";
Dir::Cache "$work/cache";
Dir::Etc::SourceList "$work/sources.list";
Dir::Etc::SourceParts "-";
APT::Sandbox::User "root";
APT::Architectures { "$(dpkg --print-architecture)"; "$arch"; };
CONF
    APT_CONFIG=$work/apt.conf apt-get update -qq >&2
    (cd "$work/debs" && APT_CONFIG=$work/apt.conf apt-get download -qq "$@" >&2)
}

unpack() { # .deb, folder, members...
    local deb=$1 folder=$2
    shift 2
    mkdir -p "$folder"
    dpkg --fsys-tarfile "$deb" | tar -x -C "$folder" --wildcards "$@"
}

get_cuda_12_4() {
    get_cuda "$1" trixie 'nvidia-cuda-toolkit=12.4.131*' 'nvidia-cuda-dev=12.4.127*' 'libcudart12=12.4.127*'
}

get_cuda_11_8() {
    get_cuda "$1" bookworm 'nvidia-cuda-toolkit=11.8.89*' 'nvidia-cuda-dev=11.8.89*' 'libcudart11.0=11.8.89*'
}

# NVIDIA's layout, which nvcc and CMake know, from Debian's, which is spread over the system. The development package
# holds every CUDA library (0.8 to 0.9 GB); headers and runtime alone are kept.
get_cuda() { # folder, suite, package=version...
    [[ $(uname -m) == x86_64 ]] || fail 'these toolkits are for x86-64 hosts'
    local folder=$1 suite=$2 work=$1.work
    shift 2
    say 'downloading 1 GB, of which 150 MB are kept'
    fetch_debian "$work" "$suite" non-free amd64 "$@"
    unpack "$work"/debs/nvidia-cuda-toolkit_*.deb "$work/x" './usr/bin/*' './usr/lib/nvidia-cuda-toolkit/bin/*' \
        './usr/lib/nvidia-cuda-toolkit/libdevice/*'
    unpack "$work"/debs/nvidia-cuda-dev_*.deb "$work/x" './usr/include/*' './usr/lib/x86_64-linux-gnu/libcudart_static.a' \
        './usr/lib/x86_64-linux-gnu/libcudadevrt.a' './usr/share/doc/nvidia-cuda-dev/copyright'
    unpack "$work"/debs/libcudart*.deb "$work/x" './usr/lib/x86_64-linux-gnu/*' # CMake wants to see it
    local usr=$work/x/usr tools=$work/x/usr/lib/nvidia-cuda-toolkit
    mkdir -p "$work/done"/{bin,nvvm/bin,lib64}
    mv "$usr"/bin/{cudafe++,fatbinary,nvlink,ptxas,bin2c,cuobjdump} "$tools/bin/nvcc" "$tools/bin/crt" "$work/done/bin"
    mv "$tools/bin/cicc" "$work/done/nvvm/bin"
    mv "$tools/libdevice" "$work/done/nvvm"
    mv "$usr/include" "$work/done"
    mv "$usr"/lib/x86_64-linux-gnu/* "$work/done/lib64"
    (cd "$work/done/lib64" && ln -s libcudart.so.*.*.* libcudart.so)
    mv "$usr/share/doc/nvidia-cuda-dev/copyright" "$work/done/EULA.txt"
    ln -s lib64 "$work/done/lib"
    cat >"$work/done/bin/nvcc.profile" <<'PROFILE'
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
PROFILE
    mv "$work/done" "$folder"
}

# What an Arm host has of CUDA (a wheel) and of Boost (a Debian package): headers are the same, libraries are not.
get_aarch64() { # folder
    local folder=$1 work=$1.work version suite
    version=$(nvcc --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
    [[ $version == 13.* ]] || fail "aarch64 needs nvcc 13, whose static runtime is on PyPI; found '${version:-none}'"
    mkdir -p "$work/done/lib"
    "$python" -m pip --disable-pip-version-check download -qq --no-deps --only-binary=:all: -d "$work/wheels" \
        --platform manylinux2014_aarch64 "nvidia-cuda-runtime==$version.*" >&2
    "$python" -m zipfile -e "$work"/wheels/*.whl "$work/x"
    mv "$work"/x/nvidia/cu13/lib/libcuda*rt* "$work/done/lib"
    suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    fetch_debian "$work" "$suite" main arm64 "$(dpkg-query -W -f '${Depends}' libboost-context-dev | grep -o '^[^ ,]*'):arm64"
    unpack "$work"/debs/libboost-context*.deb "$work/x" './usr/lib/*'
    mv "$work"/x/usr/lib/aarch64-linux-gnu/libboost_context.a "$work/done/lib"
    mv "$work/done" "$folder"
}

# Kept as the wheel has it, without the bitcode that is half of it and for other compilers.
get_nvshmem() { # folder
    local folder=$1 work=$1.work
    "$python" -m pip --disable-pip-version-check download -qq --no-deps --only-binary=:all: -d "$work/wheels" \
        "nvidia-nvshmem-cu13==${folder##*-}" >&2
    "$python" -m zipfile -e "$work"/wheels/*.whl "$work/x"
    rm "$work"/x/nvidia/nvshmem/lib/*.bc
    mv "$work/x/nvidia/nvshmem" "$folder"
}

case ${1:-} in
    cuda-12.4) get=get_cuda_12_4 ;;
    cuda-11.8) get=get_cuda_11_8 ;;
    aarch64) get=get_aarch64 ;;
    nvshmem-*) get=get_nvshmem ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
folder=$cache/$1
if [[ ! -d $folder ]]; then
    mkdir -p "$cache"
    rm -rf "$folder.work"
    "$get" "$folder"
    rm -rf "$folder.work"
fi
echo "$folder"
