"""A graph that needs no model and no key: it answers letter by letter, and asks before it sends a mail."""

import os

from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import interrupt

ANSWER = "Every letter of this answer is an event, and relay has written each of them down before you saw it."

model = FakeListChatModel(responses=[ANSWER], sleep=float(os.environ.get("PACE_S", "0.05")))


async def answer(state: MessagesState) -> dict:
    return {"messages": [await model.ainvoke(state["messages"])]}


async def send_mail(state: MessagesState) -> dict:
    decision = interrupt("Shall I send it as a mail?")
    return {"messages": [AIMessage("Sent." if decision == "yes" else "Not sent.")]}


def wants_mail(state: MessagesState) -> str:
    return "send_mail" if "mail" in state["messages"][-2].content else END


builder = StateGraph(MessagesState)
builder.add_node("answer", answer)
builder.add_node("send_mail", send_mail)
builder.add_edge(START, "answer")
builder.add_conditional_edges("answer", wants_mail)
graph = builder.compile()
