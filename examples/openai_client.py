"""Both ways from an OpenAI client: n scored choices, or one choice that n traces voted for."""

from __future__ import annotations

import argparse

import openai


def main() -> None:
    """Ask twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("-n", type=int, default=16, help="traces")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="with --enable-step")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=f"{options.url.rstrip('/')}/v1", api_key="none")
    messages = [{"role": "user", "content": options.question}]

    # The samples of one request are a group: pruned together, each with its score.
    samples = client.chat.completions.create(
        model="default", messages=messages, n=options.n, temperature=0.6,
        extra_body={"return_meta_info": True},
    )  # fmt: skip
    for choice in samples.choices:
        step = choice.meta_info["step"]
        fate = "pruned" if step["pruned"] else choice.finish_reason
        score = "no step" if step["score"] is None else f"score {step['score']:.3f}"
        print(f"trace {choice.index}: {fate}, {step['num_steps']} steps, {score}")

    # One ordinary choice: the best trace of the winning answer.
    voted = client.chat.completions.create(
        model="default", messages=messages, temperature=0.6,
        extra_body={
            "return_meta_info": True,
            "custom_params": {"step": {"traces": options.n, "vote": "weighted"}},
        },
    )  # fmt: skip
    (choice,) = voted.choices
    print(f"vote: {choice.meta_info['step']['vote']}")
    print(f"answer: {choice.message.content[-60:]!r}, {voted.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main()
