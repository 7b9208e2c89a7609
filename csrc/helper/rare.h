/* The text that most helpers use once at the most. */
#ifndef EB_RARE_H
#define EB_RARE_H

/* Takes the pages of it out of this process's memory: the kernel maps those around what is executed too, and counts
 * them as this helper's own where no other has them.  They come back by themselves. */
void eb_drop_rare_text(void);

#endif
