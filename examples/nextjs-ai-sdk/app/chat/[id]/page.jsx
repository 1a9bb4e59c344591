import { readChat } from "../../../lib/chats.js";
import { Chat } from "./chat.jsx";

export default async function Page({ params }) {
  const { id } = await params;
  return <Chat id={id} kept={await readChat(id)} />;
}
