"""The language filter judges texts that are long enough, and names what it does not know."""

from __future__ import annotations

import pytest

from crem.config import PrepareConfig
from crem.errors import ConfigError
from pipelines.duplicates.language import LanguageFilter, require_languages

SENTENCES = {
    "en": "A small boat is moored beside the old stone bridge.",
    "de": "Ein kleines Boot liegt neben der alten Steinbrücke.",
    "fr": "Un petit bateau est amarré à côté du vieux pont de pierre.",
    "ru": "Маленькая лодка стоит рядом со старым каменным мостом.",
    "ja": "小さなボートが古い石橋のそばに係留されていて、とても静かな朝の風景です。",
}


def objections(texts: list[str], *languages: str) -> str | None:
    chosen = LanguageFilter.of(PrepareConfig(languages=languages))
    assert chosen is not None
    return chosen.objection(texts)


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_in_its_language(language: str) -> None:
    assert objections([SENTENCES[language]], language) is None
    others = [other for other in SENTENCES if other != language]
    found = objections([SENTENCES[language]], *others)
    assert found is not None and found.startswith(language)


def test_any_text_of_a_row_may_object() -> None:
    assert objections([SENTENCES["en"], SENTENCES["fr"]], "en", "fr") is None
    assert str(objections([SENTENCES["en"], SENTENCES["fr"]], "en")).startswith("fr (")


def test_short_texts_are_not_judged() -> None:
    assert objections(["chat noir", "schwarze Katze", "кошка"], "en") is None


def test_no_languages_no_filter() -> None:
    assert LanguageFilter.of(PrepareConfig()) is None


def test_unknown_languages_are_refused() -> None:
    require_languages(("en", "de", "zh"))
    with pytest.raises(ConfigError, match=r"prepare\.languages=\['deutsch'\] are not known; ISO 639-1 codes are"):
        require_languages(("en", "deutsch"))
