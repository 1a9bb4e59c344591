import { mkdir, readFile, rename, writeFile } from "node:fs/promises";

// A file for each chat, in the place of a database.

const path = (id) => `.chats/${encodeURIComponent(id)}.json`;

export async function readChat(id) {
  try {
    return JSON.parse(await readFile(path(id), "utf8"));
  } catch (error) {
    if (error.code === "ENOENT") return [];
    throw error;
  }
}

export async function saveChat(id, messages) {
  await mkdir(".chats", { recursive: true });
  // Who reads meanwhile gets what was there before, not a half of this.
  await writeFile(`${path(id)}.new`, JSON.stringify(messages));
  await rename(`${path(id)}.new`, path(id));
}
