// What `make dist` has the compiler include before everything (-include), so that the library also
// loads where glibc is as old as 2.28, the oldest of a manylinux_2_28 wheel, though it is linked
// with a newer one. What newer ones added is taken in its older form; auditwheel, which reads the
// versions of all symbols, tells if there is more to it.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
// Moved into libc.so, with a new version, by glibc 2.34. PyTorch has loaded libpthread.so, where
// it was.
__asm__(".symver pthread_mutex_trylock, pthread_mutex_trylock@GLIBC_2.2.5");

// Of glibc 2.32: while it is not 0, libstdc++ counts references without atomics. It is 0 here, so
// that counts are always atomic.
extern "C" {
__attribute__((weak, visibility("hidden"))) extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif
