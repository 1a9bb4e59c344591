// A program that reads answers through one package: a line of JSON on its standard input is a wish, and what
// the package says of the answer goes to standard output, a line a note: {wish, text}, {wish, whole}, {wish, end}.
import { createInterface } from "node:readline";

/** Have `read(wish, say, show)` called for each wish, all at once if need be. It may throw, which is how the
 * answer ended then; `say` adds to its text, `show` gives all of it so far. */
export async function note(read) {
  const print = (note) => process.stdout.write(`${JSON.stringify(note)}\n`);
  for await (const line of createInterface({ input: process.stdin })) {
    const wish = JSON.parse(line);
    read(
      wish,
      (text) => print({ wish: wish.number, text }),
      (whole) => print({ wish: wish.number, whole }),
    ).then(
      (end) => print({ wish: wish.number, end: end ?? "whole" }),
      (error) => print({ wish: wish.number, end: `error: ${error.message}` }),
    );
  }
}
