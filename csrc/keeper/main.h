/* The entry point of a job's keeper, in the helper's program: see keeper.h. */
#ifndef EB_KEEPER_MAIN_H
#define EB_KEEPER_MAIN_H

int eb_keeper_main(int argc, char **argv);

#endif
