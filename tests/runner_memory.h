// Memory and threads of the programs that run the CPU kernels without torch. Every buffer is an
// allocation of its own size: under AddressSanitizer its red zones stand behind the last byte,
// elsewhere canaries stand on both sides.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "run.h"

#if defined(__SANITIZE_ADDRESS__)
inline constexpr int64_t kCanaryBytes = 0;
#else
inline constexpr int64_t kCanaryBytes = 192;
#endif
inline constexpr unsigned char kCanary = 0xA5;
inline constexpr unsigned char kPoison = 0xFF;  // NaN in every dtype
inline constexpr int64_t kThreads[] = {1, 2, 4};

class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) {
    void* address = nullptr;
    // A size of zero may give no address at all.
    const int64_t whole = std::max<int64_t>(1, bytes + 2 * kCanaryBytes);
    if (posix_memalign(&address, 64, whole) != 0) throw std::bad_alloc();
    start_ = static_cast<char*>(address);
    std::memset(start_, kCanary, whole);
    std::memset(data(), kPoison, bytes);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(start_); }

  char* data() const { return start_ + kCanaryBytes; }
  int64_t bytes() const { return bytes_; }

  void check(const char* what) const {
    const auto* canary = reinterpret_cast<const unsigned char*>(start_);
    for (int64_t i = 0; i < kCanaryBytes; ++i) {
      if (canary[i] != kCanary) throw std::runtime_error(std::string(what) + ": canary in front");
      if (canary[kCanaryBytes + bytes_ + i] != kCanary) {
        throw std::runtime_error(std::string(what) + ": canary behind");
      }
    }
  }

 private:
  int64_t bytes_;
  char* start_;
};

class ThreadedMachine : public ptv2::Machine {
 public:
  explicit ThreadedMachine(int64_t threads) : threads_(threads) {}

  int64_t threads() const override { return threads_; }

  char* allocate(int64_t bytes) override {
    pieces_.push_back(std::make_unique<Memory>(bytes));
    return pieces_.back()->data();
  }

  void parallel(int64_t workers, const std::function<void(int64_t)>& work) override {
    std::vector<std::thread> others;
    for (int64_t worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
    work(0);
    for (std::thread& other : others) other.join();
  }

  void check() const {
    for (const auto& piece : pieces_) piece->check("scratch");
  }

 private:
  int64_t threads_;
  std::vector<std::unique_ptr<Memory>> pieces_;
};
