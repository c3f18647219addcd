/* Preloaded into a process: calls on paths that hold $FAIL_PATH fail with errno $FAIL_ERRNO; $FAIL_AT is open, list or read. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(const char *at, const char *path) {
  const char *part = getenv("FAIL_PATH"), *which = getenv("FAIL_AT");
  if (!part || !*part || !which || strcmp(which, at) || !strstr(path, part)) return 0;
  errno = atoi(getenv("FAIL_ERRNO"));
  return 1;
}

static int fails_reading(int file) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails("read", path);
}

#define READS(name, parameters, arguments)                    \
  ssize_t name parameters {                                   \
    static ssize_t(*next) parameters;                         \
    if (!next) next = dlsym(RTLD_NEXT, #name);                \
    return fails_reading(file) ? -1 : next arguments;         \
  }
READS(read, (int file, void *to, size_t bytes), (file, to, bytes))
READS(pread, (int file, void *to, size_t bytes, off_t from), (file, to, bytes, from))
READS(pread64, (int file, void *to, size_t bytes, off64_t from), (file, to, bytes, from))
READS(preadv, (int file, const struct iovec *to, int count, off_t from), (file, to, count, from))
READS(preadv64, (int file, const struct iovec *to, int count, off64_t from), (file, to, count, from))

#define OPENS(name, parameters, arguments)                    \
  int name parameters {                                       \
    static int(*next) parameters;                             \
    if (!next) next = dlsym(RTLD_NEXT, #name);                \
    va_list more;                                             \
    va_start(more, flags);                                    \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more);                                             \
    return fails("open", path) ? -1 : next arguments;         \
  }
OPENS(open, (const char *path, int flags, ...), (path, flags, mode))
OPENS(open64, (const char *path, int flags, ...), (path, flags, mode))
OPENS(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPENS(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

DIR *opendir(const char *path) {
  static DIR *(*next)(const char *);
  if (!next) next = dlsym(RTLD_NEXT, "opendir");
  return fails("list", path) ? NULL : next(path);
}
