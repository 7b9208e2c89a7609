/*
 * Linked into a helper that is built with sanitizers: it runs with an empty environment and no stderr, so the
 * sanitizers' options and their log must be built in.  The log's name is SANITIZER_LOG followed by the pid.
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
