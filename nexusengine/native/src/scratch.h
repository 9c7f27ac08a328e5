// Memory of a thread that is kept between calls: aligned to 64 bytes, grown when needed, contents not kept.
#pragma once
#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

class Scratch {
public:
    ~Scratch() { std::free(data_); }

    template <class T>
    T* get(size_t count) {
        size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > bytes_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, bytes);
            bytes_ = bytes;
            if (data_ == nullptr) {
                std::fprintf(stderr, "nexusengine: out of memory for %zu bytes of scratch\n", bytes);
                std::abort();
            }
        }
        return static_cast<T*>(data_);
    }

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace
