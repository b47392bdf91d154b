"""Step 5: a server. Queries of many clients share one batch, each from the moment it comes.

python step5_server.py              # asks itself three questions, and ends
python step5_server.py --port 8000  # curl -d '{"prompt": "Once upon a time"}' localhost:8000
"""

import argparse
import json
import queue
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from baton_engines import Relay, load_model

asked = queue.Queue()  # (prompt, options, pieces of the answer), from the clients' threads


def decode(model, tokenizer) -> None:
    """A relay belongs to one thread: this one."""
    with Relay(model, num_slots=8, capacity=512, tokenizer=tokenizer) as relay:
        running = []
        while True:
            # It waits for a query only while none runs.
            while not running or not asked.empty():
                running.append(submit(relay, tokenizer.encode, *asked.get()))
            relay.step()
            for query, pieces in running:
                if query.ended:
                    pieces.put(query.error)  # None at the end of an answer
            running = [(query, pieces) for query, pieces in running if not query.ended]


def submit(relay, encode, prompt, options, pieces):
    query = relay.submit(encode(prompt), on_text=lambda _, text: pieces.put(text), **options)
    return query, pieces


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pieces = queue.Queue()
        asked.put((body.pop("prompt"), {"max_new_tokens": 32, "stop": ["."], **body}, pieces))
        self.send_response(200)
        self.end_headers()
        while isinstance(piece := pieces.get(), str):
            self.wfile.write(piece.encode())
            self.wfile.flush()

    def log_message(self, *_):
        pass


def ask(port: int, prompt: str, answers: dict[str, str]) -> None:
    body = json.dumps({"prompt": prompt}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", body) as response:
        answers[prompt] = response.read().decode()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2", help="a name, or a folder of Hugging Face")
    parser.add_argument("--port", type=int, help="serve until Ctrl-C")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    threading.Thread(target=decode, args=(model, tokenizer), daemon=True).start()
    with ThreadingHTTPServer(("127.0.0.1", arguments.port or 0), Handler) as server:
        if arguments.port is not None:
            server.serve_forever()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = {}
        clients = [
            threading.Thread(target=ask, args=(server.server_port, prompt, answers))
            for prompt in ("Once upon a time", "The capital of France is", "Two and two are")
        ]
        for client in clients:  # each enters while the others run
            client.start()
            time.sleep(0.1)
        for client in clients:
            client.join()
        for prompt, text in sorted(answers.items()):
            print(repr(prompt + text))
        server.shutdown()


if __name__ == "__main__":
    main()
