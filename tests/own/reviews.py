"""Reviews of restaurants, as a class: what a YAML file cannot say, Python can."""

import zotuner


class Reviews(zotuner.Task):
    """Was the food good?"""

    name = "reviews-in-python"
    sources = {"train": "reviews.csv"}
    test_split = "train"
    fields = {"text": str, "verdict": str}
    loss = "classification"

    def label(self, row):
        return ("bad", "good").index(row["verdict"])

    def example(self, row):
        text = row["text"].replace("\n", " ").removesuffix(".")
        return zotuner.Example(f"{text}. The food was", (" terrible", " great"), self.label(row))
