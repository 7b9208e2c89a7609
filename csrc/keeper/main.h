/* The keeper of a job, as the helper's program does it: see keeper.h. */
#ifndef EB_KEEPER_MAIN_H
#define EB_KEEPER_MAIN_H

int eb_keeper_main(int argc, char **argv);

#endif
