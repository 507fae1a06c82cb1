// libstdc++'s headers ask a variable of glibc 2.32 whether the process has one thread. Older ones
// lack it, so the library has its own, which says that there may be several.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
