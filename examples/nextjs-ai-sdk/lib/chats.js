import { mkdir, readFile, writeFile } from "node:fs/promises";

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
  await writeFile(path(id), JSON.stringify(messages));
}
