/*
 * Linked into a helper that is built with sanitizers: it runs with an empty environment and no stderr,
 * so their options and where they report cannot come from outside.  SANITIZER_LOG is the file name's
 * beginning, the pid its end.
 */
#define OPTIONS "log_path=" SANITIZER_LOG ":print_stacktrace=1:"

const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

const char *__asan_default_options(void)
{
    return OPTIONS "detect_leaks=1:detect_stack_use_after_return=0";
}

const char *__ubsan_default_options(void)
{
    return OPTIONS;
}
