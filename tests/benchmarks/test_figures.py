from benchmarks.figures import BEGIN, END, README, figures


def test_readme_holds_what_the_result_files_say() -> None:
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == figures()
